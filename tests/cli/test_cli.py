import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from oats.bench.spread import Spread
from oats.checkpoint import loading, saving
from oats.cli import app
from oats.errors import CheckpointError, ConfigError, OatsError, OutputExistsError
from oats.kernels.isa import available_isas
from oats.models import decoders
from tests.tiny import TEXT, save_dense

transformers = pytest.importorskip("transformers")

SMALL = ["--samples", "4", "--length", "32", "--iterations", "3"]
OATS = [sys.executable, "-c", "from oats.cli import main; main()"]
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def compressed(dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "compressed"
    assert run("compress", dense, out, "--calibration", text, *SMALL).exit_code == 0
    return out


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(*arguments, code=1):
    """Run a command that must fail with one line on stderr; returns the line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("oats: error: "), result.stderr
    return lines[0]


def entries(directory):
    return sorted(path.name for path in directory.iterdir())


# --- the program ---------------------------------------------------------------------------------------


def test_help_does_not_import_torch():
    code = (
        "import sys; from oats.cli import app; app(['--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "False", result.stderr
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", result.stdout)
    assert "Example: oats compress " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command):
    assert f"Example: oats {command} " in run(command, "--help").stdout


def test_every_command_has_every_option_and_argument_explained():
    for command in COMMANDS.values():
        assert command.help
        for parameter in command.params:
            assert parameter.help.endswith("."), (command.name, parameter.name)
            if parameter.default is None and not parameter.required and parameter.name != "directory":
                assert isinstance(parameter.show_default, str), (command.name, parameter.name)


def test_a_package_that_is_missing_is_said_with_the_extra_that_has_it():
    commands = ["compress x y", "quantize x y", "eval x", "info x", "generate x hi", "chat x", "report x"]
    code = f"""
import sys
from typer.testing import CliRunner
from oats.cli import app
sys.modules.update(transformers=None, safetensors=None)
for command in {commands!r}:
    result = CliRunner().invoke(app, command.split())
    print(result.exit_code, result.stderr, end="")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    assert len(lines) == len(commands), result
    for line in lines:
        assert re.fullmatch(
            r"1 oats: error: (transformers|safetensors) is not installed, which this command needs: "
            r"pip install 'oats-torch\[hf\]'",
            line,
        )


def test_the_program_prints_an_error_as_one_line_and_exits_with_1():
    result = subprocess.run(
        [*OATS, "compress", "nothing", "out", "--compression", "1.5"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "oats: error: compression must be in [0, 1), got 1.5\n"


def test_usage_errors_exit_with_2():
    assert run("compress", "model").exit_code == 2
    assert run("compress", "model", "out", "--rank-ratio", "much").exit_code == 2
    assert run("eval").exit_code == 2


def test_version():
    assert re.fullmatch(r"oats \d+\.\d+\.\d+\n", run("--version").stdout)


# --- compress ------------------------------------------------------------------------------------------


def test_a_compressed_directory_loads_with_plain_transformers(dense, compressed):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "model = A.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, len(T.from_pretrained(sys.argv[1])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, compressed], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["SparseLowRankLinear", "258"], result.stderr
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        entries(compressed)
    )
    weights = "model.safetensors"
    assert (compressed / weights).stat().st_size < 0.7 * (dense / weights).stat().st_size


def test_compress_prints_json(dense, text, tmp_path):
    result = run(
        "compress", dense, tmp_path / "out", "--calibration", text, *SMALL, "--json", "--dtype", "bf16",
        "--compression", 0.6, "--pattern", "layer", "--skip", "*.down_proj", "--seed", 3,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["layers"] == 12
    assert (report["compression"], report["pattern"], report["skip"], report["seed"]) == (
        0.6, "layer", ["*.down_proj"], 3,
    )  # fmt: skip
    assert report["calibration"]["samples"] == 4 and report["calibration"]["text"] == str(text)
    assert report["disk_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["pattern"] == "layer" and not any("down_proj" in name for name in settings["layers"])
    assert entries(tmp_path) == ["out"]


def test_compress_past_the_published_method(dense, text, tmp_path):
    result = run(
        "compress", dense, tmp_path / "out", "--calibration", text, *SMALL, "--json",
        "--method", "oats-hessian", "--match-blocks", 1,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert (report["method"], report["block_matching"]) == ("oats-hessian", 1)
    info = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert "oats-hessian" in json.dumps(info)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.arange(40)[None]).logits.isfinite().all()


def test_the_same_command_gives_the_same_bytes(dense, compressed, text, tmp_path):
    run("compress", dense, tmp_path / "again", "--calibration", text, *SMALL)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (compressed / name).read_bytes()


def test_compress_calibrates_on_the_built_in_text(dense, tmp_path):
    result = run("compress", dense, tmp_path / "out", *SMALL, "--json")
    assert json.loads(result.stdout)["calibration"]["split"] == "first half"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compression", "1"], r"compression must be in \[0, 1\), got 1.0"),
        (["--compression", "-0.1"], r"compression must be in"),
        (["--compression", "nan"], r"compression must be in"),
        (["--rank-ratio", "1.01"], r"rank_ratio must be in \[0, 1\], got 1.01"),
        (["--pattern", "4:2"], r"pattern must be .*, got '4:2'"),
        (["--method", "hessian"], r"method must be one of oats, oats-hessian, .*, dsnot, got 'hessian'"),
        (["--match-blocks", "-1"], r"block_matching must be a whole number of passes, at least 0, got -1"),
        (["--svd", "magic"], r'svd must be "fast" or "exact", got \'magic\''),
        (["--iterations", "0"], r"iterations must be a whole number of at least 1, got 0"),
        (["--dtype", "int8"], r'dtype must be "bf16", "fp32" or None, got \'int8\''),
        (["--samples", "1000"], r"has \d+ tokens, but 1000 samples of 512 need \d+; give a longer text"),
        (["--samples", "0"], r"at least 1 sample of 2 tokens, got 0 of 512; raise"),
        (["--length", "1"], r"at least 1 sample of 2 tokens, got 64 of 1; raise"),
        (["--calibration", "missing.txt"], r"cannot read the text file missing.txt: No such file"),
        (["--calibration", os.devnull], r"the text file /dev/null is empty"),
        (["--pattern", "3:4", "--samples", "4", "--length", "32"], r"lower the compression to 0.25 or less"),
    ],
)
def test_compress_refuses(dense, tmp_path, options, message):
    assert re.search(message, fails("compress", dense, tmp_path / "out", *options))
    assert entries(tmp_path) == []


def test_compress_refuses_a_model_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    out = tmp_path / "out"
    assert "there is no model directory" in fails("compress", tmp_path / "missing", out)
    assert "neither config.json nor a .gguf file" in fails("compress", tmp_path / "empty", out)
    assert "is a file but not a .gguf file" in fails("compress", tmp_path / "file.txt", out)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).touch()
    assert "2 .gguf files (a.gguf, b.gguf); give the path of one" in fails(
        "compress", tmp_path / "empty", out
    )
    (tmp_path / "empty" / "b.gguf").unlink()
    assert "cannot load the model" in fails("compress", tmp_path / "empty", out)
    assert not out.exists()


def test_compress_refuses_a_compressed_model(compressed, text, tmp_path):
    line = fails("compress", compressed, tmp_path / "out", "--calibration", text, *SMALL)
    assert "no linear layer to compress" in line and "they are compressed already" in line
    assert entries(tmp_path) == []


def test_compress_refuses_a_damaged_model(dense, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot load the model" in fails("compress", broken, tmp_path / "out")
    assert "model.safetensors: cannot be read as safetensors" in fails("info", broken)


def test_compress_refuses_a_model_that_lacks_a_weight(dense, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(dense, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    line = fails("compress", model, tmp_path / "out")
    assert "lacks 1 of its weights, e.g. model.layers.1.mlp.up_proj.weight; download it again" in line


def test_a_hub_name_that_cannot_be_reached_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fails("compress", "nobody/no-such-model", tmp_path / "out")
    assert "no such local path, so it was looked up on the hub" in line


# --- the output directory ------------------------------------------------------------------------------


def test_an_output_that_is_in_use_is_refused_before_the_model_is_loaded(dense, tmp_path, monkeypatch):
    def load_model(*arguments):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(loading, "load_model", load_model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    assert "is not empty; choose another, or overwrite it" in fails("compress", dense, tmp_path / "full")
    assert "holds files but no model" in fails("compress", dense, tmp_path / "full", "--overwrite")
    assert "is a file; choose a directory" in fails("compress", dense, tmp_path / "file")
    assert "cannot be made" in fails("compress", dense, tmp_path / "file" / "out")
    assert "holds the model itself" in fails("compress", dense, dense, "--overwrite")
    assert "holds the model itself" in fails("compress", dense, dense.parent, "--overwrite")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_model_as_a_whole(dense, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "stale.safetensors").touch()
    assert run("compress", dense, out, "--calibration", text, *SMALL).exit_code == 1
    assert run("compress", dense, out, "--calibration", text, *SMALL, "--overwrite").exit_code == 0
    assert "stale.safetensors" not in entries(out)
    assert entries(tmp_path) == ["out"]


def test_an_empty_output_directory_is_used(dense, text, tmp_path):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    assert run("compress", dense, out, "--calibration", text, *SMALL).exit_code == 0
    assert entries(out.parent) == ["out"]


class Unsaveable:
    def __init__(self, error):
        self.error = error

    def save_pretrained(self, directory):
        (Path(directory) / "config.json").write_text("{}")
        raise self.error


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()]
)
def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path, error, overwrite):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text("old")
    before = entries(tmp_path)
    with pytest.raises(OatsError if isinstance(error, OSError) else type(error)) as raised:
        saving.save_model(Unsaveable(error), None, out, overwrite=overwrite)
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {out}: No space left on device; nothing was changed there"
    assert entries(tmp_path) == before
    assert not overwrite or (out / "config.json").read_text() == "old"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    class Model:
        def save_pretrained(self, directory):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("theirs")

    with pytest.raises(OatsError, match="Directory not empty; nothing was changed there"):
        saving.save_model(Model(), None, tmp_path / "out")
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    with pytest.raises(OutputExistsError):
        saving.save_model(Model(), None, tmp_path / "out")


def interrupted(patch, arguments, how):
    """Run a command in a process that hangs where `patch` says, and send it a signal there."""
    # A process that was started in the background inherits that SIGINT is ignored.
    code = f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def hang(*arguments, **options):
    print("hanging", flush=True)
    time.sleep(60)
{patch}
from oats.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().endswith("hanging\n"), process.stderr.read()
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in stderr and "Error" not in stderr
    return process.pid


# As from a GGUF file: a model that is read and written as a whole.
IN_MEMORY = "from oats.checkpoint import loading; loading.load_dense_source = lambda *_: None"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_while_it_saves_leaves_nothing_that_looks_finished(
    dense, text, tmp_path, how, monkeypatch
):
    monkeypatch.setattr(loading, "load_dense_source", lambda *_: None)
    command = ["compress", dense, tmp_path / "out", "--calibration", text, *SMALL]
    # Every file is written by then; only the name is missing.
    patch = f"{IN_MEMORY}; from oats.checkpoint import atomic; atomic.flush = hang"
    pid = interrupted(patch, command, how)
    assert entries(tmp_path) == ([f".out.partial-{pid}"] if how == signal.SIGKILL else [])
    assert run(*command).exit_code == 0
    assert entries(tmp_path) == ["out"]


def test_what_other_runs_are_writing_is_left_alone(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_dense_source", lambda *_: None)
    theirs = [f".out.partial-{os.getppid()}", ".out.partial-x", ".out2.partial-99999999", ".out.partial-"]
    for name in [*theirs, ".out.partial-99999999"]:
        (tmp_path / name).mkdir()
    assert run("compress", dense, tmp_path / "out", "--calibration", text, *SMALL).exit_code == 0
    assert entries(tmp_path) == sorted([*theirs, "out"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_while_it_compresses_leaves_no_output(dense, text, tmp_path, how):
    command = ["compress", dense, tmp_path / "out", "--calibration", text, *SMALL]
    interrupted(
        "from oats.compression import block_decomposition as b; b.decompose_by_method = hang", command, how
    )
    assert entries(tmp_path) == ([".out.unfinished"] if how == signal.SIGKILL else [])
    assert run(*command).exit_code == 0
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("command", [["eval"], ["generate", "a prompt"]])
def test_ctrl_c_is_quiet(dense, command):
    name, *rest = command
    patch = "import transformers; transformers.LlamaForCausalLM.forward = hang"
    interrupted(patch, [name, dense, *rest], signal.SIGINT)


# --- eval ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_eval_prints_every_setting(which, text, request):
    directory = request.getfixturevalue(which)
    result = run("eval", directory, "--text", text, "--context", 64, "--stride", 32, "--max-tokens", 500)
    assert result.exit_code == 0
    output = " ".join(result.stdout.split())
    for expected in ("perplexity", "fox.txt", "sha256", "whole file", "500 scored, each once", "64 tokens",
                     "BOS", "stride 32", "dtype float32", "threads"):  # fmt: skip
        assert expected in output
    as_json = run(
        "eval", directory, "--text", text, "--context", 64, "--stride", 32, "--max-tokens", 500, "--json"
    )
    report = json.loads(as_json.stdout)
    assert f"{report['perplexity']:.4f}" in output
    assert report["tokens"] == 500


def test_eval_of_a_short_text(dense, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("Hi")
    report = json.loads(run("eval", dense, "--text", file, "--json").stdout)
    assert (report["tokens"], report["context"]) == (2, 128)
    assert report["perplexity"] == pytest.approx(258, rel=0.2)


def test_eval_takes_the_built_in_text(dense):
    report = json.loads(run("eval", dense, "--max-tokens", 50, "--json").stdout)
    assert report["split"] == "second half" and report["text"].startswith("pydoc_data.topics (Python 3")


def test_eval_refuses(dense, tmp_path):
    assert "is empty; give one with text" in fails("eval", dense, "--text", os.devnull)
    assert "cannot read the text file" in fails("eval", dense, "--text", tmp_path / "missing")
    assert "at most 128, the model's own, got 129" in fails("eval", dense, "--context", 129)
    assert "stride must be in [1, context = 128], got 0" in fails("eval", dense, "--stride", 0)
    assert "max_tokens must be at least 1" in fails("eval", dense, "--max-tokens", 0)
    assert 'dtype must be "bf16" or "fp32"' in fails("eval", dense, "--dtype", "fp16")
    assert "there is no model directory" in fails("eval", tmp_path / "missing")


# --- generate ------------------------------------------------------------------------------------------


def test_generate_is_reproducible(compressed):
    first = run("generate", compressed, "The quick", "--max-new-tokens", 8)
    assert first.exit_code == 0 and first.stdout.startswith("The quick")
    assert run("generate", compressed, "The quick", "--max-new-tokens", 8).stdout == first.stdout
    sampled = ["generate", compressed, "The quick", "--max-new-tokens", 8, "--temperature", 1.5]
    assert run(*sampled, "--seed", 1).stdout == run(*sampled, "--seed", 1).stdout
    assert run(*sampled, "--seed", 1).stdout != run(*sampled, "--seed", 2).stdout


def test_generate_prints_json(compressed):
    options = ["generate", compressed, "The quick", "--max-new-tokens", 8]
    report = json.loads(run(*options, "--json").stdout)
    assert report["text"] == run(*options).stdout.removesuffix("\n")
    assert (report["prompt"], report["tokens"], report["max_new_tokens"]) == ("The quick", 8, 8)
    assert (report["temperature"], report["seed"], report["dtype"]) == (0, 0, "float32")
    assert report["seconds"] > 0 and report["threads"] == torch.get_num_threads()
    assert report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0
    assert (report["prompt_tokens"], report["engine"], report["reason"]) == (10, "native", None)
    shown = run(*options)
    assert re.fullmatch(r"8 tokens, prefill \d+ tokens/s, decode [\d.]+ tokens/s\n", shown.stderr)


def test_generate_says_why_it_runs_in_transformers(compressed, monkeypatch):
    options = ["generate", compressed, "The quick", "--max-new-tokens", 8]
    native = run(*options)
    monkeypatch.delitem(decoders.DECODERS, "llama")
    other = run(*options)
    assert other.stdout == native.stdout
    assert (
        other.stderr.count("runs in transformers, which is slower: the engine does not know the architecture")
        == 1
    )
    report = json.loads(run(*options, "--json", "--temperature", 1).stdout)
    assert report["engine"] == "transformers" and "does not know the architecture" in report["reason"]


def test_generate_refuses(dense):
    assert "longer than the model's context of 128" in fails("generate", dense, "a", "--max-new-tokens", 200)
    assert "max_new_tokens must be at least 1, got 0" in fails("generate", dense, "a", "--max-new-tokens", 0)
    assert "temperature must be 0 or more, got -1.0" in fails("generate", dense, "a", "--temperature", -1)


# --- bench and info ------------------------------------------------------------------------------------


@pytest.fixture
def quick_bench(monkeypatch):
    monkeypatch.setattr("oats.bench.contenders._CYCLED_BYTES", 1_000_000)
    monkeypatch.setattr("oats.bench.contenders._last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr("oats.bench.layer_latency.read_time", lambda: lambda: 40.0)
    monkeypatch.setattr("oats.bench.layer_latency._cpu_ticks", lambda: (0, 0))
    monkeypatch.setattr("oats.bench.layer_latency._REST_SECONDS", 0.0)


def test_bench_of_one_shape(quick_bench):
    options = ["bench", "--d-out", 512, "--d-in", 512, "--repetitions", 3]
    options += ["--threads", torch.get_num_threads()]
    result = run(*options)
    assert result.exit_code == 0
    assert "512 x 512, compression 0.5" in result.stdout and "torch bf16 dense" in result.stdout
    (row,) = json.loads(run(*options, "--json", "--dtype", "fp32").stdout)["rows"]
    assert row["ours"]["rank"] == 32 and row["ours"]["dtype"] == "fp32" and row["ratio"] > 0


def test_bench_of_a_model(quick_bench):
    report = json.loads(run("bench", "--model", "gemma-3-270m", "--repetitions", 1, "--json").stdout)
    layers = [(row["layer"], row["d_out"], row["d_in"]) for row in report["rows"]]
    assert layers == [
        ("q_proj", 1024, 640),
        ("o_proj", 640, 1024),
        ("k_proj, v_proj", 256, 640),
        ("gate_proj, up_proj", 2048, 640),
        ("down_proj", 640, 2048),
    ]


def test_bench_of_a_grid(quick_bench):
    options = ["--batch", "1,2", "--compression", "0.4,0.5", "--dtype", "bf16,fp32", "--isa", "all"]
    small = ["--d-out", 64, "--d-in", 64, "--repetitions", 1]
    rows = json.loads(run("bench", *small, *options, "--json").stdout)["rows"]
    cases = {(r["batch"], r["compression"], r["ours"]["dtype"], r["ours"]["isa"]) for r in rows}
    assert len(rows) == len(cases) == 2 * 2 * 2 * len(available_isas())


@pytest.mark.parametrize(("p90", "busy"), [(1.4, False), (1.6, True)])
def test_bench_says_when_the_machine_was_busy(quick_bench, monkeypatch, p90, busy):
    monkeypatch.setattr(Spread, "of", lambda values: Spread(1.0, 0.9, p90))
    output = run("bench", "--d-out", 64, "--d-in", 64, "--repetitions", 2).stdout
    assert ("the machine was busy" in output) == busy


def test_bench_says_that_other_processes_were_running(quick_bench, monkeypatch):
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr("oats.bench.layer_latency._cpu_ticks", lambda: ((n := next(ticks)) // 2, n))
    output = run("bench", "--d-out", 64, "--d-in", 64, "--repetitions", 2).stdout
    assert "other processes took 50% of the CPUs" in output


def test_bench_refuses():
    assert "threads must be at least 1" in fails("bench", "--threads", 0)
    assert 'dtype must be "bf16", "fp32"' in fails("bench", "--dtype", "int2")
    assert "compression must be in" in fails("bench", "--compression", 2)
    assert "at least 1, got 0, 4096, [1] and 200" in fails("bench", "--d-out", 0)
    assert "batch must be a number, or some with commas between, got 'a'" in fails("bench", "--batch", "a")
    assert "no model is called 'gpt-9'" in fails("bench", "--model", "gpt-9")
    assert "no instruction set 'amx'" in fails("bench", "--isa", "amx")


def test_info_of_the_installation(monkeypatch):
    monkeypatch.delenv("OATS_ISA", raising=False)
    report = json.loads(run("info", "--json").stdout)
    assert report["isa"] in report["available_isas"] and report["oats_isa"] is None
    output = run("info").stdout
    for expected in (report["isa"], report["torch"], "threads", "OATS_ISA"):
        assert expected in output


def test_info_of_a_compressed_model(compressed):
    report = json.loads(run("info", compressed, "--json").stdout)
    assert len(report["layers"]) == 14
    assert report["layers"][0]["name"].startswith("model.layers.0.")
    layer = next(layer for layer in report["layers"] if layer["name"] == "model.layers.0.mlp.up_proj")
    assert (layer["d_out"], layer["d_in"], layer["rank"]) == (128, 64, 5)
    assert layer["density"] == pytest.approx(0.375)
    stored = 128 * 64 // 8 + 4 * (layer["nnz"] + 5 * (128 + 64))
    assert layer["stored_bytes"] == stored
    assert layer["share_of_dense_bf16"] == stored / (2 * 128 * 64)
    assert report["disk_bytes"] == sum(file.stat().st_size for file in compressed.iterdir())
    output = run("info", compressed).stdout
    assert "14 layers" in output and "128 x 64" in output


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"model_type": "opt"}, "the engine does not know the architecture 'opt'"),
        ({"head_dim": 8}, "heads have 8 dimensions"),
        ({"hidden_act": "mish"}, "the engine does not know the activation 'mish'"),
        ({"head_dim": None, "num_attention_heads": 0}, None),
        ({"head_dim": "wide", "hidden_act": ["silu"]}, "the activation"),
    ],
)
def test_info_says_what_a_model_runs_in(dense, tmp_path, changed, reason):
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changed))
    found = json.loads(run("info", model, "--json").stdout)["not_in_engine"]
    shown = run("info", model).stdout
    if reason is None:
        assert found is None and re.search(r"runs in +the engine", shown)
    else:
        assert reason in found and re.search(r"runs in +transformers: ", shown)


def test_info_of_a_dense_model(dense):
    report = json.loads(run("info", dense, "--json").stdout)
    assert report["layers"] == [] and report["config"] is None
    assert "not compressed by oats" in run("info", dense).stdout


def test_info_refuses(compressed, tmp_path):
    assert "it has no config.json" in fails("info", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in fails("info", tmp_path)
    (tmp_path / "config.json").write_text((compressed / "config.json").read_text())
    assert "has no .safetensors file" in fails("info", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((compressed / "model.safetensors").read_bytes())
    assert run("info", tmp_path).exit_code == 0


UP = "model.layers.0.mlp.up_proj"


def setting(**values):
    return lambda config: config | {"quantization_config": config["quantization_config"] | values}


def sizes(name, **values):
    def change(config):
        layers = config["quantization_config"]["layers"]
        return setting(layers=layers | {name: layers[UP] | values})(config)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: [config], r"config.json: is \[\{.*expected a JSON object"),
        (lambda config: config | {"quantization_config": "x"}, r"config is 'x', expected a JSON object"),
        (setting(layers=None), r"layers is None, expected an object"),
        (setting(layers={UP: {"rank": 5}}), r"is \{'rank': 5\}, expected \{\"rank\": a whole number"),
        (setting(format_version=5), r"format_version is 5, but oats-torch .*`pip install -U oats-torch`"),
        (setting(svd=[]), r"quantization_config: "),
        (setting(blocks=1), r"unknown keys \['blocks'\]"),
        (sizes("extra"), r": extra: mask is missing"),
        (sizes(UP, rank=4), rf"{UP}: low_rank_u has shape \(128, 5\), but config.json says \(128, 4\)"),
        (sizes(UP, nnz=2**62), rf"{UP}: values has shape \(\d+,\), but config.json says \({2**62},\)"),
    ],
)
def test_a_damaged_config_is_refused(compressed, tmp_path, change, message):
    shutil.copytree(compressed, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert re.search(message, fails("info", tmp_path / "model"))
    assert "config.json" in fails("eval", tmp_path / "model", "--max-tokens", 10)


@pytest.mark.parametrize(
    ("part", "new", "message"),
    [
        ("low_rank_u", lambda t: t.flatten(), r"low_rank_u has shape \(640,\), expected a matrix"),
        ("low_rank_v", lambda t: t.sum(), r"low_rank_v has shape \(\), expected a matrix"),
        ("mask", lambda t: t[:0], r"mask has shape \(0, 8\), expected a matrix"),
        ("mask", lambda t: t[:, 1:], r"mask has shape \(128, 7\), but config.json says \(128, 8\)"),
        ("values", lambda t: t.half(), r"values is torch.float16, expected torch.float32 or torch.bfloat16"),
    ],
)
def test_info_refuses_tensors_that_are_damaged(compressed, tmp_path, part, new, message):
    from safetensors.torch import load_file, save_file

    shutil.copytree(compressed, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.{part}"] = new(tensors[f"{UP}.{part}"]).contiguous()
    save_file(tensors, file, {"format": "pt"})
    assert re.search(rf"{UP}: {message}", fails("info", tmp_path / "model"))


# --- GGUF ----------------------------------------------------------------------------------------------


def test_load_model_takes_a_directory_with_one_gguf_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot load the model"):
        (tmp_path / "model.gguf").write_bytes(b"not a gguf file")
        loading.load_model(tmp_path)


def test_load_model_refuses_other_dtypes(dense):
    with pytest.raises(ConfigError, match='dtype must be "bf16" or "fp32", got \'fp16\''):
        loading.load_model(dense, dtype="fp16")


# --- quantize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_quantize(compressed, tmp_path, values):
    out = tmp_path / "codes"
    report = json.loads(run("quantize", compressed, out, "--values", values, "--json").stdout)
    assert report["layer_bytes"] < (0.7 if values == "int8" else 0.5) * report["layer_bytes_before"]
    layers = json.loads(run("info", out, "--json").stdout)["layers"]
    assert {layer["dtype"] for layer in layers} == {values}
    assert run("generate", out, "The quick", "--max-new-tokens", 4).exit_code == 0
    # Once more, from the codes: back to numbers.
    again = tmp_path / "exact"
    assert run("quantize", out, again, "--values", "exact", "--low-rank", "exact").exit_code == 0
    assert json.loads((again / "config.json").read_text())["quantization_config"]["format_version"] == 1


def test_quantize_tells_a_log_how_far_it_is(compressed, tmp_path, monkeypatch):
    assert "Quantising" not in run("quantize", compressed, tmp_path / "quiet").stderr
    monkeypatch.setattr("oats.cli.console.LOG_SECONDS", 0)
    lines = run("quantize", compressed, tmp_path / "codes").stderr.splitlines()
    assert len(lines) == 14
    assert re.fullmatch(
        r"Quantising: 7 of 14 layers  model\.layers\.0\.\S+, \d+ s, about \d+ s left", lines[6]
    )


def test_quantize_with_calibration(compressed, text, tmp_path):
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    run("quantize", compressed, plain, "--values", "int4")
    settings = ["--calibration", text, "--samples", 4, "--length", 24]
    assert run("quantize", compressed, fitted, "--values", "int4", *settings).exit_code == 0
    files = [(out / "model.safetensors").read_bytes() for out in (plain, fitted)]
    assert len(files[0]) == len(files[1]) and files[0] != files[1]


def test_quantize_refuses(dense, compressed, tmp_path):
    assert "no layer that oats compressed" in fails("quantize", dense, tmp_path / "out")
    assert "values are 'int5'" in fails("quantize", compressed, tmp_path / "out", "--values", "int5")
    assert "scale_columns is 100" in fails("quantize", compressed, tmp_path / "out", "--scale-columns", "100")
    assert "holds the model itself" in fails("quantize", compressed, compressed)
    assert entries(tmp_path) == []
