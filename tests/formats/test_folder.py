"""Hugging Face folders: from the disk, without code of theirs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deadcheck
from deadcheck import LoadOptions
from deadcheck.errors import ModelFileError, TrustRequired, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=20, word_embed_proj_dim=16,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).eval().save_pretrained(tmp_path / "opt", max_shard_size="5kB")
    return tmp_path / "opt"


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_folder_gives_the_counts_of_the_live_model(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers

    assert len(list(folder.glob("*.safetensors"))) > 1
    ids = torch.arange(60).reshape(10, 6) % 46 + 4
    live = transformers.OPTForCausalLM.from_pretrained(folder, attn_implementation="eager")
    capfd.readouterr()

    diagnosis = deadcheck.scan(folder, {"input_ids": ids}, batch_size=4)

    assert capfd.readouterr() == ("", "")
    expected = deadcheck.scan(live, {"input_ids": ids}, batch_size=4)
    assert [site.key for site in diagnosis] == [f"model.decoder.layers.{i}.activation_fn" for i in range(2)]
    for site, reference in zip(diagnosis, expected, strict=True):
        assert site.stats.zeros.tolist() == reference.stats.zeros.tolist()
    model = diagnosis.measurement.model
    assert (model.format, model.read) == ("hf-dir", "audited")


def test_code_of_the_folder_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")

    with pytest.raises(TrustRequired, match="is code that comes with the folder, which is never run"):
        deadcheck.scan(folder, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})
    assert not (folder / "ran").exists()


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(ModelFileError, match=rf"1 of its files are missing \({shard.name}\)"):
        deadcheck.scan(folder, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})


def test_without_the_library_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(UsageError, match=r"install torch-deadcheck\[hf\], or give code with --arch"):
        deadcheck.scan(folder, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})


def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file(nn.Sequential(nn.Linear(6, 8), nn.ReLU()).state_dict(), folder / "model.safetensors")
    return folder


def test_a_folder_without_a_config_needs_arch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config.json, so nothing tells how its model is built; add --arch"):
        deadcheck.scan(plain(tmp_path), torch.randn(3, 6))


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    table = {"weight_map": {"0.weight": "../m/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))

    with pytest.raises(ModelFileError, match="names no files of this folder"):
        deadcheck.scan(folder, torch.randn(3, 6), load=LoadOptions(arch="x:y"))


def test_a_folder_of_pickles_is_told_to_be_converted(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")

    with pytest.raises(ModelFileError, match=r"holds no .safetensors file; convert its weights"):
        deadcheck.scan(folder, torch.randn(3, 6))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "quantization_config": {"bits": 4}}))

    with pytest.raises(ModelFileError, match="scan the model before quantisation"):
        deadcheck.scan(folder, torch.randn(3, 6))
