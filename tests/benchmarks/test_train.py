"""Training of small models: what is saved is the same kind of checkpoint, whatever it was computed in."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import train


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_saved_is_bfloat16_and_has_tied_embeddings_once(tmp_path, monkeypatch, capsys, dtype):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"line {n} of a text to learn from\n" for n in range(3000)))
    size = ["--vocab-size", "300", "--hidden-size", "32", "--layers", "1", "--experts", "4", "--heads", "2"]
    size += ["--moe-intermediate-size", "32", "--context", "16", "--batch", "2", "--steps", "2", "--dtype", dtype]
    monkeypatch.setattr("sys.argv", ["train", str(out), "--text", str(text), "--architecture", "mixtral", *size])
    train.main()
    assert "step 2 tokens 64" in capsys.readouterr().out
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
