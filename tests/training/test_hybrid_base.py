"""A base whose decoder mixes recurrences and attention: profile, schedule, student, evaluation, merged folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.data_rows import write_rows
from helpers.quick_runs import QUICK, metrics_entries, run_config
from helpers.tiny_base import SMALL, composed, configured
from transformers import Lfm2Config, LlavaForConditionalGeneration, PreTrainedConfig, Qwen3_5TextConfig

import latefusion as lf
from latefusion.data.collate import collator_without_weights
from latefusion.data.scenes import load_scenes
from latefusion.eval.evaluate import Arguments, evaluate
from latefusion.models.profile_schedule import read_schedule
from latefusion.training.embedded.architecture import build_config
from latefusion.training.embedded.vocabulary import BOS, EOS, PAD, VOCABULARY, build_processor

LAYERS = 4
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
DECODERS = {
    "convolutions": lambda: Lfm2Config(
        **SIZES, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2
    ),
    "linear attention": lambda: Qwen3_5TextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


def save_base(folder: Path, decoder: PreTrainedConfig) -> Path:
    config = build_config(
        image_size=16, patch_size=8, tower_width=32, tower_layers=1, width=32, layers=LAYERS, heads=2, mlp=32
    )
    config.text_config = decoder
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4)
    model.save_pretrained(folder)
    build_processor(image_size=16, patch_size=8).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DECODERS)
def test_turns_are_not_kept_apart_by_masks_that_recurrences_do_not_have(name: str, tmp_path: Path) -> None:
    """A policy that keeps everything, and none at all, would let each question read those before it."""
    config = configured(f"model.path={save_base(tmp_path, DECODERS[name]())}", "data=scenes")
    with pytest.raises(ValueError, match=r"^data\.isolate=true .* do not have: set data\.isolate=false"):
        collator_without_weights(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECODERS)
def test_a_hybrid_goes_from_its_profile_to_one_merged_folder(
    name: str, tmp_path: Path, one_thread: None
) -> None:
    base, student = save_base(tmp_path / "base", DECODERS[name]()), tmp_path / "student"
    words = ("schedule=auto", "schedule.samples=4", "schedule.confirm=4", "schedule.bound=0.02")
    words += (f"model.path={base}", f"output_dir={student}", "entry.images=16", "train.batch_size=2")
    words += ("data.isolate=false", "data.turns=1")
    run_config(composed("model=other", *QUICK, *SMALL, *words))
    schedule = json.loads((student / "vision_schedule.json").read_text())
    assert schedule == read_schedule(student / "profile").to_dict()
    curves = json.loads((student / "profile" / "profile.json").read_text())["curves"]
    assert all(len(curve) >= LAYERS for curve in curves.values() if isinstance(curve, list))
    losses = [entry["loss"] for entry in metrics_entries(student) if "loss" in entry]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())

    scenes = load_scenes("test", n_scenes=1)
    scenes[0]["image"].save(tmp_path / "scene.png")
    rows = [
        {"id": str(i), "image": "scene.png", "question": scene["question"], "answers": [scene["answer"]]}
        for i, scene in enumerate(scenes.select(range(3)))
    ]
    write_rows(tmp_path, *rows, name="questions.jsonl")
    report = evaluate(
        Arguments(
            checkpoint=str(student),
            data=str(tmp_path / "questions.jsonl"),
            output=str(tmp_path / "report"),
            batch_size=2,
            controls=False,
            batches=[],
            lengths=[],
        )
    )
    assert report is not None
    answers = [
        json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()
    ]
    assert {"dense", "student"} <= {answer["system"] for answer in answers}

    lf.merge(student, tmp_path / "merged", dtype=torch.float32)
    apart, processor = lf.load(student, merge=False, dtype=torch.float32)
    merged, _ = lf.load(tmp_path / "merged", dtype=torch.float32)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": rows[0]["question"]}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=text, images=scenes[0]["image"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, apart(**inputs).logits, atol=1e-4)
    assert lf.attached(merged).policy.to_dict() == schedule
