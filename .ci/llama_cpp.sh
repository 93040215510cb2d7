#!/usr/bin/env bash
# .ci/llama_cpp.sh FOLDER: llama.cpp's converter, as the source distribution of llama-cpp-python has it; nothing is built.
set -euo pipefail
version=0.3.36
folder="$1"
[[ ! -f "$folder/convert_hf_to_gguf.py" ]] || exit 0
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python -m pip download -qq --no-deps --no-binary llama-cpp-python -d "$scratch" "llama-cpp-python==$version"
inside="llama_cpp_python-$version/vendor/llama.cpp"
mkdir -p "$folder"
tar -xzf "$scratch/llama_cpp_python-$version.tar.gz" -C "$folder" --strip-components=3 \
  "$inside/gguf-py" "$inside/conversion" "$inside/convert_hf_to_gguf.py"
