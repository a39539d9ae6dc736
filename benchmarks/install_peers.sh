#!/usr/bin/env bash
# Installs what the peers need into environments of their own under .bench/; one that fails is reported, and
# the benchmark leaves it out.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p .bench
python=${PYTHON:-python3}
# llama.cpp comes inside this source package; only its tensor library is built.
llama=llama-cpp-python==0.3.36
jobs=${JOBS:-$(nproc)}

environment() { # folder, packages …: made again when the list changes
  local folder=.bench/$1 && shift
  [ "$(cat "$folder/packages" 2>/dev/null)" = "$*" ] && return
  "$python" -m venv --clear "$folder" && "$folder/bin/pip" install -q "$@" && echo "$*" >"$folder/packages"
}

runtimes() {
  environment runtimes numpy scipy onnx onnxruntime openvino
}

deepsparse() { # wants a Python before 3.12
  environment deepsparse deepsparse==1.8.0
}

ggml() {
  [ "$(cat .bench/ggml/version 2>/dev/null)" = "$llama" ] && return
  rm -rf .bench/llama && mkdir -p .bench/llama/source &&
    "$python" -m venv .bench/llama/venv && .bench/llama/venv/bin/pip install -q cmake ninja scikit-build-core &&
    PATH=$PWD/.bench/llama/venv/bin:$PATH .bench/llama/venv/bin/pip download -q --no-deps --no-binary :all: \
      --no-build-isolation -d .bench/llama "$llama" &&
    tar -xzf .bench/llama/*.tar.gz -C .bench/llama/source --strip-components=1 || return
  local source=.bench/llama/source/vendor/llama.cpp/ggml
  # A file that only `make install` would use is not in the package.
  touch "$source/ggml.pc.in"
  PATH=$PWD/.bench/llama/venv/bin:$PATH
  cmake -S "$source" -B .bench/ggml -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
    -DGGML_NATIVE=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF >/dev/null &&
    cmake --build .bench/ggml -j "$jobs" >/dev/null && echo "$llama" >.bench/ggml/version
}

for peer in runtimes deepsparse ggml; do
  echo "peers: $peer"
  "$peer" || echo "peers: $peer could not be installed; it will be left out" >&2
done
[ -n "${SPARAMX:-}" ] || echo "peers: SparAMX is left out; set SPARAMX to the folder SparAMX of a checkout"
