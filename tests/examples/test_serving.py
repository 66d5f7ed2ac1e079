"""``pretrain.py eval`` and ``pretrain.py generate``."""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import pretrain
from pretraining import serving

from eplb_jax import read_loads
from tests.jaxpipe.deepseek.goldens import unpack


def run(command, *arguments):
    parser, function = {
        "eval": (serving.eval_parser, serving.evaluate),
        "generate": (serving.generate_parser, serving.generate),
    }[command]
    lines = []
    function(parser().parse_args(list(arguments)), lines.append)
    return lines


@pytest.mark.slow
def test_an_evaluation_tells_loads_by_which_copies_are_placed(tmp_path):
    file = tmp_path / "loads.npz"
    sizes = "--layers", "2", "--sequence", "16"
    lines = run("eval", *sizes, "--batches", "2", "--batch-size", "2", "--save-loads", str(file))
    assert lines[1].startswith("loss 5.") and "perplexity 2" in lines[1] and "of 64 tokens" in lines[1]
    loads = read_loads(file)
    assert loads.shape == (1, 8) and loads.sum() == 64 * 2
    shares = loads[0] / loads[0].mean()
    assert lines[5].split(" | ")[:3] == ["| 1", f"{shares.min():.2f}", f"{shares.max():.2f}"]
    flags = "--layers", "2", "--new-tokens", "3"
    plain = run("generate", *flags, "--prompt", "ab", "--tokens", "1,2,3", "--copies", "2")
    spread = run("generate", *flags, "--prompt", "ab", "--tokens", "1,2,3", "--copies", "2", "--devices", "2",
                 "--loads", str(file), "--slots", "10")  # fmt: skip
    assert plain[1:5] == spread[1:5] and plain[1][3:] == plain[2][3:] and len(plain[3].split("-> ")[1].split(",")) == 3
    assert plain[5].startswith("prompts: 10 tokens") and "8 tokens of 4 requests" in plain[6]


def test_a_folder_answers_as_transformers_does(tmp_path):
    pytest.importorskip("safetensors", reason="needs the package safetensors")
    folder = unpack("v3", tmp_path)
    expected = np.load(folder / "reference.npz")["generated"][0]
    tokens = ",".join(map(str, expected[:8]))
    lines = run("generate", "--from", str(folder), "--tokens", tokens, "--new-tokens", "16")
    assert lines[1] == f"[0] {tokens} -> {','.join(map(str, expected[8:]))}"


def test_text_goes_through_the_tokenizer_of_the_model(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    pytest.importorskip("safetensors", reason="needs the package safetensors")
    folder = unpack("v3", tmp_path)
    prompt = ["generate", "--from", str(folder), "--prompt", "one two"]
    texts = ["eval", "--from", str(folder), "--data", str(tmp_path / "a.txt")]
    (tmp_path / "a.txt").write_text("one two three\n" * 50_000)
    for arguments, instead in ((prompt, "--tokens 1,2,3"), (texts, ".npy or .bin files of its tokens")):
        assert pretrain.main(arguments) == 2
        said = capsys.readouterr().err
        assert "is text, and no tokenizer.json says which tokens" in said and said.strip().endswith(instead)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 7, "two": 9, "?": 2}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.enable_truncation(1)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "?"}')
    parser = serving.generate_parser()
    encode, decode, ends = serving._text(parser.parse_args(prompt[1:]))
    assert encode("two one") == [9, 7] and decode([7, 9]) == "one two" and ends == [2]
    if importlib.util.find_spec("jinja2"):
        template = "{{ messages[0].role }} {{ messages[0].content }} one{% if add_generation_prompt %} two{% endif %}"
        settings = {"eos_token": {"content": "one"}, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        encode, _, ends = serving._text(parser.parse_args([*prompt[1:], "--chat"]))
        assert encode("two") == [2, 9, 7, 9] and ends == [7]
    # Of a folder, as in training.
    encode, *_ = serving._text(parser.parse_args(["--tokenizer", str(folder), "--prompt", "a"]))
    assert encode("two") == [9]
    config, reader = serving._described(serving.eval_parser().parse_args(texts[1:]))
    assert (config.vocab, reader) == (128, folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("[]")
    assert pretrain.main(prompt) == 2 and "tokenizer.json is no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "nothing to continue: give --prompt TEXT"),
        (["generate", "--tokens", "1", "--chat"], "--chat: that is for text, so give --prompt TEXT"),
        (["generate", "--prompt", "a", "--chat"], "reads bytes, which have no chat template; give --tokenizer"),
        (["generate", "--tokens", "1,x"], "--tokens 1,x: give whole numbers"),
        (["generate", "--tokens", "1", "--copies", "0"], "--copies 0: at least 1"),
        (["generate", "--tokens", "1", "--slots", "9"], "--slots 9: which experts get copies is decided by --loads"),
        (["generate", "--tokens", "1", "--devices", "99"], f"--devices 99: this process has {jax.device_count()}"),
        (["generate", "--prompt", "a", "--tokenizer", "none.json"], "no file none.json: --tokenizer names a"),
        (["generate", "--tokens", "1", "--loads", "a.npz", "--slots", "0"], "--slots 0: at least one for each expert"),
        (["generate", "--from", "F", "--layers", "2", "--tokens", "1"], "--layers 2: F has its own layers"),
        (["eval", "--run", "R", "--layers", "2"], "--layers 2: R has its own layers"),
        (["eval", "--sequence", "0"], "--sequence 0: at least 1 token"),
        (["eval", "--tokenizer", "t.json"], "--tokenizer t.json without --data"),
        (["generate", "--run", "none", "--tokens", "1"], "name the --out folder of a run, or its checkpoints"),
        (["eval", "--batches", "0"], "--batches 0 --batch-size 8: both are at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message, capsys):
    assert pretrain.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_evaluated_as_it_evaluated_itself(tmp_path, capsys):
    pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
    sizes = ["--layers", "3", "--sequence", "16", "--microbatches", "2", "--microbatch-size", "2"]
    with jax.numpy_dtype_promotion("standard"):
        code = pretrain.main([
            *("--schedule", "1f1b", "--mesh", "pp=1,ep=1", "--steps", "2", "--eval-every", "2", "--eval-batches", "2"),
            *("--out", str(tmp_path / "run"), *sizes),
        ])  # fmt: skip
    assert code == 0
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["held_out_loss"]
    data = "--sequence", "16", "--batches", "2", "--batch-size", "4"
    lines = run("eval", "--run", str(tmp_path / "run"), *data)
    assert float(lines[1].split()[1]) == pytest.approx(told, abs=1e-3)
