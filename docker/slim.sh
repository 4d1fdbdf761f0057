#!/bin/sh
# docker/slim.sh ENVIRONMENT
#
# Takes out of a virtual environment what running never needs (tests, headers, type stubs,
# C++ programs of torch, compilers of its CUDA build), then compiles what is left: the image's
# user cannot write bytecode.
# unchecked-hash: no time stamps, so that the same sources give the same files.
set -eu
site=$(echo "$1"/lib/python3*/site-packages)

find "$site" -depth -type d \( -name tests -o -name test -o -name __pycache__ \) \
  -not -path '*/torch/_*' -not -path '*/torch/testing/*' -exec rm -rf {} +
find "$site" -type f \( -name '*.pyi' -o -name '*.a' -o -name '*.h' -o -name '*.hpp' \
  -o -name '*.pxd' -o -name '*.cmake' \) -delete
if [ -d "$site/torch" ]; then
  rm -rf "$site/torch/include" "$site/torch/share" "$site"/torch/lib/*_test.so
  # torch refuses to be imported without torch_shm_manager.
  find "$site/torch/bin" -type f -not -name torch_shm_manager -delete
fi
# The CUDA build's: torch.compile's compiler, a solver for several GPUs, and a second build of the
# run-time compiler. torch imports without them, and no other library of it names them.
rm -rf "$site/triton" "$site"/nvidia/*/lib/libcusolverMg.so* "$site"/nvidia/*/lib/libnvrtc*.alt.so*
python3 -m compileall -qq -j 2 \
  --invalidation-mode unchecked-hash "$site" || true  # torch brings templates that are not valid Python
