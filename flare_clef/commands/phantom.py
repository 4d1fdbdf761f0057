def phantom() -> None:
    """(being written)"""
