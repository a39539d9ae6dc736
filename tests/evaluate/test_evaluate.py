import math

import pytest
import torch

from oats.bench.model_speed import InEngine, in_engine, model_speeds
from oats.bench.spread import Spread
from oats.compression.calibration_text import Text, builtin_text, read_text
from oats.compression.tokenization import calibration_windows, tokenize
from oats.engine.engine import Engine
from oats.errors import CalibrationError, ConfigError, OatsError
from oats.evaluate.perplexity import perplexity

transformers = pytest.importorskip("transformers")

VOCABULARY, LIMIT, BOS = 97, 64, 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LIMIT, bos_token_id=BOS, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def token_by_token(model, ids, bos, context, stride):
    """The definition, one forward pass a token: which window scores it follows from its position."""
    sequence = ([] if bos is None else [bos]) + ids.tolist()
    nll, right = [], 0
    for position in range(1, len(sequence)):
        # End of the window that scores this position.
        end = 1 + context
        while end <= position:
            end += stride
        end = min(end, len(sequence))
        window = sequence[max(0, end - 1 - context) : position]
        if bos is not None:
            window[0] = bos
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([window])).logits[0, -1].double().log_softmax(-1)
        nll.append(-log_probabilities[sequence[position]].item())
        right += int(log_probabilities.argmax()) == sequence[position]
    return math.exp(sum(nll) / len(nll)), right / len(nll), len(nll)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(
    ("tokens", "context", "stride"),
    [(100, 16, 16), (100, 16, 5), (50, 64, 64), (7, 32, 8), (33, 32, 32), (32, 32, 1), (20, 1, 1), (2, 8, 8)],
)
def test_perplexity_is_that_of_its_definition(model, tokens, context, stride, bos, native):
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(tokens))
    engine = Engine(model) if native else None
    assert engine is None or engine.reason is None
    result = perplexity(model, ids, bos=bos, context=context, stride=stride, engine=engine)
    expected, accuracy, scored = token_by_token(model, ids, bos, context, stride)
    assert result.tokens == scored == tokens - (bos is None)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.accuracy == pytest.approx(accuracy)
    assert (result.context, result.stride, result.bos) == (context, stride, bos is not None)


def test_perplexity_of_a_text_within_one_context_is_the_models_own_loss(model):
    ids = torch.arange(3, 40)
    with torch.no_grad():
        loss = model(input_ids=ids[None], labels=ids[None]).loss
    result = perplexity(model, ids)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.context == LIMIT
    assert result.dtype == "float32"


def test_perplexity_reports_progress_and_restores_the_mode(model):
    calls = []
    model.train()
    perplexity(
        model, torch.arange(3, 33), bos=BOS, context=16, stride=8, progress=lambda *call: calls.append(call)
    )
    assert model.training
    model.eval()
    assert [done for done, _, _ in calls] == [16, 24, 30]
    assert {total for _, total, _ in calls} == {30}


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([], {"bos": BOS}, CalibrationError, "got 0 tokens; give a longer text"),
        ([5], {}, CalibrationError, "got 1 tokens and no BOS token; give a longer text"),
        ([5, 6], {"context": LIMIT + 1}, ConfigError, f"at most {LIMIT}, the model's own, got {LIMIT + 1}"),
        ([5, 6], {"context": 0}, ConfigError, "context must be at least 1"),
        ([5, 6], {"context": 8, "stride": 9}, ConfigError, r"stride must be in \[1, context = 8\], got 9"),
        ([5, 6], {"stride": 0}, ConfigError, r"stride must be in \[1, context = 64\], got 0"),
    ],
)
def test_perplexity_refuses(model, ids, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(model, torch.tensor(ids, dtype=torch.int64), **options)


def test_perplexity_of_a_damaged_model_is_an_error_and_not_nan(model):
    weight = model.lm_head.weight
    kept = weight.data.clone()
    try:
        weight.data[0, 0] = float("nan")
        with pytest.raises(OatsError, match="NaN or infinite"):
            perplexity(model, torch.arange(3, 30))
    finally:
        weight.data.copy_(kept)


def test_the_built_in_halves_are_disjoint_and_complete():
    from pydoc_data.topics import topics

    first, second = builtin_text("first"), builtin_text("second")
    assert first.content + second.content == "\n\n".join(topics.values())
    assert abs(len(first.content) - len(second.content)) <= 1
    assert first.sha256 != second.sha256


class Letters:
    """A tokenizer of one token a letter."""

    bos_token_id = BOS

    def __call__(self, text, **options):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def test_tokenize_refuses_a_tokenizer_of_another_model():
    assert tokenize(Letters(), Text("abc", "t", "all"), 128).tolist() == [97, 98, 99]
    with pytest.raises(CalibrationError, match="token 99 but the model has 99 embeddings"):
        tokenize(Letters(), Text("abc", "t", "all"), 99)
    with pytest.raises(CalibrationError, match="gives no token"):
        tokenize(Letters(), Text("", "t", "all"))


def test_read_text_refuses(tmp_path):
    with pytest.raises(CalibrationError, match=r"cannot read the text file .*missing.txt: No such file"):
        read_text(tmp_path / "missing.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match=r"blank.txt is empty"):
        read_text(tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(CalibrationError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "latin.txt")


@pytest.mark.parametrize("bos", [None, BOS])
def test_calibration_windows_do_not_overlap(bos):
    taken = 8 - (bos is not None)
    for tokens in (taken * 5, taken * 5 + 3, 1000):
        windows = calibration_windows(torch.arange(100, 100 + tokens), 5, 8, bos=bos)
        assert windows.shape == (5, 8)
        if bos is not None:
            assert (windows[:, 0] == bos).all()
            windows = windows[:, 1:]
        assert windows.unique().numel() == windows.numel()
        assert windows[0, 0] == 100
        assert windows[-1, -1] == 99 + tokens


def test_calibration_windows_refuse_a_short_text():
    with pytest.raises(
        CalibrationError, match=r"a.txt has 100 tokens, but 11 samples of 10 need 110; .* at most 10"
    ):
        calibration_windows(torch.arange(100), 11, 10, name="a.txt")
    with pytest.raises(CalibrationError, match="at least 1 sample of 2 tokens, got 0 of 10"):
        calibration_windows(torch.arange(100), 0, 10)


def test_generation_speed(model):
    calls = []
    speeds = model_speeds(
        {"a": model, "b": model}, torch.arange(3, 13), new_tokens=4, repetitions=2,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls[-1] == (6, 6, "b")
    for speed in speeds.values():
        assert 0 < speed.decode.p10 <= speed.decode.median <= speed.decode.p90
        assert speed.prefill.median > 0
    with pytest.raises(ConfigError, match="2 new tokens"):
        model_speeds({"a": model}, torch.arange(3, 13), new_tokens=1)


def test_generation_speed_in_the_engine(model):
    models = in_engine({"native": model, "other": object.__new__(Itself)})
    assert isinstance(models["native"], InEngine) and isinstance(models["other"], Itself)
    speeds = model_speeds(models, torch.arange(3, 13), new_tokens=4, repetitions=1)
    assert speeds["native"].decode.median > 0 and speeds["other"].decode.median == pytest.approx(1)


class Itself:
    def timed_generate(self, prompt, new_tokens):
        return 0.0, [1.0 + at for at in range(new_tokens)]


def test_spread():
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread(1.0, 0.9, 1.6).is_wide and not Spread(1.0, 0.1, 1.4).is_wide
