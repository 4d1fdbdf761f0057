"""``python -m flare_clef``."""

from flare_clef.cli import main

if __name__ == "__main__":
    main()
