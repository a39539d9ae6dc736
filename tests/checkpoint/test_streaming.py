"""Compression of a directory, block by block: the same files as in memory, whatever stops it on the way."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import oats
from oats.checkpoint.loading import load_dense_source, load_model
from oats.checkpoint.record import Record
from oats.checkpoint.saving import save_model
from oats.checkpoint.staging import Staging
from oats.checkpoint.streaming import _choose_tokens_per_batch, compress_directory
from oats.cli import app
from oats.compression.memory import Limit, block_bytes, resident_bytes
from oats.compression.targets import find_targets

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 61, (6, 24), generator=torch.Generator().manual_seed(1))
FAST = oats.OatsConfig(iterations=2)


SIZES = dict(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip


def make(directory: Path, config=None, **changes) -> Path:
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(**SIZES, num_hidden_layers=4, **changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    alphabet = {"<s>": 0, **{chr(ord("a") + i): i + 1 for i in range(26)}}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "letters.txt"
    file.write_text(" ".join(random.Random(0).choices("abcdefghij", k=6000)))
    return file


def stream(source: Path, out: Path, config: oats.OatsConfig = FAST, **options) -> dict[str, bytes]:
    opened, tokenizer, dtype = load_dense_source(source, config.dtype)
    compress_directory(opened, tokenizer, TOKENS, out, config, dtype=dtype, **options)
    return content(out)


CARD = ("README.md", "oats_report.json")


def content(directory: Path) -> dict[str, bytes]:
    """Each file but the model card, which has the name of the directory and the time that it took."""
    files = sorted(directory.iterdir())
    return {file.name: file.read_bytes() for file in files if file.name not in CARD}


def in_memory(source: Path, out: Path, config: oats.OatsConfig) -> dict[str, bytes]:
    model, tokenizer = load_model(source, config.dtype)
    oats.compress_(model, TOKENS, config)
    save_model(model, tokenizer, out)
    return content(out)


@pytest.mark.parametrize(
    "config",
    [
        FAST,
        oats.OatsConfig(iterations=2, dtype="bf16", skip="*.o_proj"),
        oats.OatsConfig(iterations=2, method="oats-hessian", block_matching=1),
        oats.OatsConfig(iterations=2, moments="dense"),
        oats.OatsConfig(iterations=2, budget="owl", rank_ratios=(0.1, 0.4)),
        oats.OatsConfig(iterations=2, budget="error"),
        oats.OatsConfig(iterations=2, dtype="bf16", values="int8", head="int8"),
    ],
    ids=["published", "bf16", "hessian, matched", "dense moments", "owl", "error", "head"],
)
def test_the_same_files_as_in_memory(dense, tmp_path, config) -> None:
    streamed, expected = stream(dense, tmp_path / "a", config), in_memory(dense, tmp_path / "b", config)
    assert streamed.keys() == expected.keys()
    assert [name for name in expected if streamed[name] != expected[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def reshaped(dense: Path, directory: Path, dtype: torch.dtype | None = None) -> Path:
    """The same model in two files with an index, tensors of one block in both."""
    shutil.copytree(dense, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file(
            {n: tensors[n].to(dtype or tensors[n].dtype) for n in part}, directory / file, {"format": "pt"}
        )
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory


def test_a_sharded_model(dense, tmp_path) -> None:
    assert stream(reshaped(dense, tmp_path / "shards"), tmp_path / "a") == stream(dense, tmp_path / "b")


def test_files_of_another_dtype_than_the_result(dense, tmp_path) -> None:
    half = reshaped(dense, tmp_path / "half", torch.float16)
    config = json.loads((half / "config.json").read_text()) | {"dtype": "float16"}
    (half / "config.json").write_text(json.dumps(config))
    streamed = stream(half, tmp_path / "a")
    assert streamed == in_memory(half, tmp_path / "b", FAST)
    assert json.loads(streamed["config.json"])["dtype"] == "bfloat16"


@pytest.mark.parametrize("head", [None, "int8"])
def test_a_large_model_stays_in_files_of_one_block(dense, tmp_path, monkeypatch, head) -> None:
    config = oats.OatsConfig(iterations=2, head=head)
    expected = stream(dense, tmp_path / "one", config)
    monkeypatch.setattr("oats.checkpoint.shards.JOINED_BYTES", 0)
    monkeypatch.setattr("oats.checkpoint.shards.SHARD_BYTES", 12_000)
    files = stream(dense, tmp_path / "many", config)
    # Embedding, head and norm beside four blocks.
    shards = [f"model-{i + 1:05}-of-00006.safetensors" for i in range(6)]
    assert sorted(name for name in files if name.endswith(".safetensors")) == shards
    index = json.loads(files["model.safetensors.index.json"])
    together = {}
    for shard in shards:
        tensors = load_file(tmp_path / "many" / shard)
        assert all(index["weight_map"][name] == shard for name in tensors)
        together |= tensors
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == single.keys() and expected["config.json"] == files["config.json"]
    assert all(torch.equal(together[name], tensor) for name, tensor in single.items())
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many")]
    torch.testing.assert_close(*[model(TOKENS).logits for model in models], rtol=0, atol=0)


@pytest.mark.parametrize("head", [None, "int8"])
def test_tied_embeddings_are_stored_once(tmp_path, head) -> None:
    tied = make(tmp_path / "tied", tie_word_embeddings=True)
    config = oats.OatsConfig(iterations=2, head=head)
    assert stream(tied, tmp_path / "a", config) == in_memory(tied, tmp_path / "b", config)


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4),
        lambda: transformers.Phi3Config(**SIZES, num_hidden_layers=2, pad_token_id=0),
    ],
    ids=["transposed weights", "fused projections"],
)
def test_architectures(tmp_path, config) -> None:
    model = make(tmp_path / "model", config())
    assert stream(model, tmp_path / "a") == in_memory(model, tmp_path / "b", FAST)


def test_experts_that_are_put_together_are_read_with_the_whole_model(text, tmp_path) -> None:
    config = transformers.MixtralConfig(**SIZES, num_hidden_layers=1, num_local_experts=2)
    model = make(tmp_path / "model", config)
    assert load_dense_source(model) is None
    log = tmp_path / "log"
    assert wait(child(command(model, tmp_path / "out", text), log)) == 0, log.read_text()
    assert wait(child([*command(model, tmp_path / "two", text), "--memory-limit", "9GB"], log)) == 1
    assert "cannot be read block by block" in log.read_text()


def test_only_one_block_has_weights(dense, tmp_path) -> None:
    opened, tokenizer, dtype = load_dense_source(dense)
    filled = []

    def progress(*_) -> None:
        blocks = opened.blocks
        filled.append([not all(p.is_meta for p in block.parameters()) for block in blocks])

    compress_directory(opened, tokenizer, TOKENS, tmp_path / "out", FAST, dtype=dtype, progress=progress)
    assert len(filled) == 28
    # The last layer of a block is called once all of it is compressed: only its norms are parameters then.
    assert all(sum(each) == 1 for each in filled)


def test_blocks_that_share_weights_are_not_read_one_by_one(dense, tmp_path) -> None:
    from oats.checkpoint.dense_source import DenseSource

    model, _ = load_model(dense)
    assert DenseSource.open(dense, model) is not None
    model, _ = load_model(dense)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert DenseSource.open(dense, model) is None


# --- stopped runs --------------------------------------------------------------------------------------


def child(arguments, log: Path, before=lambda: None) -> int:
    """Run a command in a forked process, its output to a file; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)  # noqa: SIM115
        before()
        app([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_rename(number: int):
    """Kill this process just before the file with that number gets its name."""

    def before() -> None:
        left = [number]

        def hook(event: str, _) -> None:
            if event == "os.rename":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return before


def killed_in_removal(number: int, out: Path):
    """Kill this process just before a file is removed, the one with that number, once `out` is there."""

    def before() -> None:
        left = [number]

        def hook(event: str, _) -> None:
            if event in ("os.remove", "os.rmdir") and out.exists():
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return before


def command(dense: Path, out: Path, text: Path) -> list[object]:
    small = ["--samples", 4, "--length", 24, "--iterations", 2]
    return ["compress", dense, out, "--calibration", text, *small]


@pytest.fixture(scope="module")
def finished(dense, text, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert wait(child(command(dense, out, text), out.with_suffix(".log"))) == 0, out.with_suffix(
        ".log"
    ).read_text()
    return content(out)


@pytest.mark.parametrize("seed", [0])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(dense, text, finished, tmp_path, seed) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    order = random.Random(seed)
    blocks = []
    for _ in range(30):
        code = wait(child(command(dense, out, text), log, killed_at_rename(order.randint(2, 7))))
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        staging = Staging(out)
        blocks.append(staging.progress()["blocks"] if staging.exists() else 0)
        assert not out.exists() or content(out) == finished
    assert len(blocks) >= 3 and blocks == sorted(blocks) and blocks[-1] >= 3
    assert content(out) == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_what_was_not_written_to_the_end_is_not_delivered(dense, text, finished, tmp_path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert wait(child(command(dense, out, text), log, killed_at_rename(5))) == -signal.SIGKILL
    (Staging(out).model / ".tmpX4gT0a").write_text("")  # as safetensors names what it writes
    assert wait(child(command(dense, out, text), log)) == 0, log.read_text()
    assert content(out) == finished


@pytest.mark.parametrize("name", CARD)
def test_killed_while_it_writes_the_card_the_next_run_leaves_no_part_of_it(
    dense, text, finished, tmp_path, name
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def before() -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event == "os.rename" and Path(arguments[1]).name == name:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    assert wait(child(command(dense, out, text), log, before)) == -signal.SIGKILL
    assert not out.exists()
    assert wait(child(command(dense, out, text), log)) == 0, log.read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted([*finished, *CARD])
    assert content(out) == finished and Record.read(out).errors


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_killed_while_it_clears_up_the_next_run_finishes_that(
    dense, text, finished, tmp_path, number
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert wait(child(command(dense, out, text), log, killed_in_removal(number, out))) == -signal.SIGKILL
    assert content(out) == finished and Staging(out).directory.exists()
    # Without its plan, what is left says nothing of this run: the output is refused like any other.
    known = Staging(out).exists()
    assert wait(child(command(dense, out, text), log)) == (0 if known else 1), log.read_text()
    assert content(out) == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_killed_while_a_restart_clears_up_it_is_not_taken_for_finished(
    dense, text, finished, tmp_path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    old = out / "config.json"
    old.write_text("{}")
    stopped(dense, out, overwrite=True)
    for number in range(1, 5):
        restart = [*command(dense, out, text), "--overwrite", "--restart"]
        code = wait(child(restart, log, killed_in_removal(number, out)))
        if code != -signal.SIGKILL:
            break
        assert old.read_text() == "{}" and not Staging(out).is_delivered()
    assert wait(child([*command(dense, out, text), "--overwrite"], log)) == 0, log.read_text()
    assert content(out) == finished


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(dense, text, finished, tmp_path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    order, started = random.Random(), time.monotonic()
    assert wait(child(command(dense, tmp_path / "whole", text), log)) == 0
    whole = time.monotonic() - started
    for _ in range(5):
        pid = child(command(dense, out, text), log)
        time.sleep(order.uniform(0.2, 1) * whole)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0 or out.exists():
            break
    assert wait(child(command(dense, out, text), log)) in (0, 1)
    assert content(out) == finished and not Staging(out).directory.exists()


def test_a_finished_block_is_not_done_again(dense, tmp_path) -> None:
    done: list[str] = []

    def stop(_done, _total, name, _error) -> None:
        done.append(name)
        if name.startswith("model.layers.2."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(dense, tmp_path / "a", progress=stop)
    assert not (tmp_path / "a").exists() and Staging(tmp_path / "a").progress()["blocks"] == 2
    again: list[str] = []
    files = stream(dense, tmp_path / "a", progress=lambda *a: again.append(a[2]))
    assert done[:-1] + again == [*done[:-1], *again] and not {*done[:-1]} & {*again}
    assert files == stream(dense, tmp_path / "b")


def test_a_stop_before_the_first_block_is_finished_leaves_nothing(dense, tmp_path) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(dense, tmp_path / "a", progress=stop)
    assert list(tmp_path.iterdir()) == []


def stopped(dense: Path, out: Path, config: oats.OatsConfig = FAST, **options) -> None:
    def stop(done, *_) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(dense, out, config, progress=stop, **options)


def test_the_time_of_a_run_that_was_stopped_counts(dense, tmp_path) -> None:
    out = tmp_path / "out"
    stopped(dense, out)
    spent = Staging(out).progress()["seconds"]
    assert spent > 0
    opened, tokenizer, dtype = load_dense_source(dense)
    report = compress_directory(opened, tokenizer, TOKENS, out, FAST, dtype=dtype)
    assert report.seconds_before == spent


def test_another_run_does_not_go_on_from_it(dense, tmp_path) -> None:
    out = tmp_path / "out"
    stopped(dense, out)
    with pytest.raises(oats.ConfigError, match=r"compression was 0\.5 and is 0\.6.*--restart"):
        stream(dense, out, oats.OatsConfig(iterations=2, compression=0.6))
    opened, tokenizer, dtype = load_dense_source(dense)
    with pytest.raises(oats.ConfigError, match=r"calibration was .* and is .*Run the same command"):
        compress_directory(opened, tokenizer, (TOKENS + 1) % 61, out, FAST, dtype=dtype)
    changed = tmp_path / "changed"
    shutil.copytree(dense, changed)
    with pytest.raises(oats.ConfigError, match="model was "):
        stream(changed, out)
    assert Staging(out).progress()["blocks"] == 1
    restarted = stream(dense, out, oats.OatsConfig(iterations=2, compression=0.6), restart=True)
    assert restarted == stream(dense, tmp_path / "b", oats.OatsConfig(iterations=2, compression=0.6))


def test_two_runs_do_not_write_the_same_output(dense, tmp_path) -> None:
    stopped(dense, tmp_path / "out")
    other = Staging(tmp_path / "out")
    other.lock()
    with pytest.raises(oats.OutputExistsError, match="another run is writing"):
        stream(dense, tmp_path / "out")
    other.unlock()
    stream(dense, tmp_path / "out")


def test_damaged_leftovers_are_an_error(dense, tmp_path) -> None:
    stopped(dense, tmp_path / "out")
    directory = Staging(tmp_path / "out").directory
    (hidden,) = (directory / "hidden" / "1").iterdir()
    hidden.write_bytes(hidden.read_bytes()[:-10])
    with pytest.raises(oats.FormatError, match=r"missing or damaged.*--restart"):
        stream(dense, tmp_path / "out")
    (directory / "progress.json").write_text("{")
    with pytest.raises(oats.FormatError, match=r"progress\.json cannot be read"):
        stream(dense, tmp_path / "out")


def test_a_full_disk_keeps_what_was_finished(dense, text, finished, tmp_path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    sizes = {}

    def most(number: int):
        # The system refuses to let a file grow past this: as on a full disk, some of it is written.
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

    assert wait(child(command(dense, out, text), log, most(20_000))) == 1
    line = log.read_text()
    assert re.fullmatch(r"oats: error: cannot write .*: File too large.*no block is finished yet\n", line), (
        line
    )
    assert not out.exists()
    # The shard of a block fits; the joined file does not.
    sizes["all"] = len(finished["model.safetensors"])
    assert wait(child(command(dense, out, text), log, most(sizes["all"] - 1000))) == 1
    line = log.read_text()
    assert "it goes on after the 4 finished blocks" in line and line.count("\n") == 1, line
    assert not out.exists()
    assert wait(child(command(dense, out, text), log)) == 0, log.read_text()
    assert content(out) == finished


def test_overwrite_replaces_the_model_in_the_end(dense, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    stopped(dense, out, overwrite=True)
    assert content(out) == {"config.json": b"old"}
    assert stream(dense, out, overwrite=True) == stream(dense, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out"]


# --- memory --------------------------------------------------------------------------------------------


def test_a_memory_limit_that_cannot_be_kept_is_refused(dense, tmp_path) -> None:
    with pytest.raises(
        oats.ConfigError, match=r"needs about .* GB, more than the memory limit of 0\.10 GB: "
    ):
        stream(dense, tmp_path / "out", memory_limit=100_000_000)
    assert list(tmp_path.iterdir()) == []


def test_batches_shrink_to_keep_a_limit() -> None:
    """Of Llama-3-8B's shapes: no weights are needed to predict what a block takes."""
    with torch.device("meta"):
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
            num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).bfloat16()
    source = SimpleNamespace(model=model, path="model.layers", blocks=model.model.layers)
    staging = Staging(Path("/nonexistent/out"))

    def tokens(limit: int | None, config: oats.OatsConfig) -> int:
        targets = find_targets(model, "model.layers", model.model.layers, config)
        return _choose_tokens_per_batch(source, targets, staging, config, torch.bfloat16, Limit(limit))

    def need(tokens: int, config: oats.OatsConfig) -> int:
        targets = find_targets(model, "model.layers", model.model.layers, config)
        block = block_bytes(model.model.layers[0], targets.blocks[0], config, torch.bfloat16, tokens)
        return resident_bytes() + model.get_input_embeddings().weight.nbytes + sum(block.values())

    # The published method: 4 GB beside the block's own weights.
    published = oats.OatsConfig()
    assert need(4096, published) - resident_bytes() < 4e9
    assert tokens(None, published) == 4096
    # Matching runs the block beside its optimiser: there it is the batch that counts.
    matched = oats.OatsConfig(block_matching=1)
    assert tokens(None, matched) == 1024
    assert tokens(need(512, matched) + 10**8, matched) == 512
    with pytest.raises(oats.ConfigError, match=r"4\.\d\d GB for running the block or decomposing"):
        tokens(need(64, matched), matched)


def test_the_peak_is_reported(dense, text, tmp_path) -> None:
    log = tmp_path / "log"
    arguments = [*command(dense, tmp_path / "out", text), "--memory-limit", "20GB", "--json"]
    assert wait(child(arguments, log)) == 0
    report = json.loads(log.read_text())
    assert 10**8 < report["peak_memory_bytes"] < 20 * 10**9


# --- what is shown -------------------------------------------------------------------------------------


def test_a_log_gets_lines_with_the_error_and_the_time_left(dense, text, tmp_path) -> None:
    from oats.cli import console

    log = tmp_path / "log"
    shown = command(dense, tmp_path / "out", text)
    assert wait(child(shown, log, lambda: setattr(console, "LOG_SECONDS", 0))) == 0
    lines = [line for line in log.read_text().splitlines() if " of 28 layers" in line]
    assert len(lines) == 28 and lines[0].startswith("1 of 28 layers, model.layers.0.self_attn.q_proj  error ")
    assert all("mean 0." in line and line.endswith(" s left") for line in lines[1:])


def test_ctrl_c_says_that_finished_blocks_are_kept(dense, text, tmp_path) -> None:
    from oats.compression import block_decomposition

    decompose, calls = block_decomposition.decompose_by_method, []

    def stop_in_the_third_block(*arguments):
        calls.append(arguments)
        if "layers.2." in arguments[3]:
            os.kill(os.getpid(), signal.SIGINT)
        return decompose(*arguments)

    def before() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        block_decomposition.decompose_by_method = stop_in_the_third_block

    log = tmp_path / "log"
    assert wait(child(command(dense, tmp_path / "out", text), log, before)) == 130
    assert "Stopped after 2 finished blocks; the same command goes on from there." in " ".join(
        log.read_text().split()
    )
