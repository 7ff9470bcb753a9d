"""Saved, loaded, merged, loaded, saved and loaded again: the same logits, in every family and variant of LoRA."""

import json
import pickle
import subprocess
import sys
import warnings

import huggingface_hub
import pytest
import torch
from helpers.families import FAMILIES, build, prompt
from helpers.tiny_base import shake
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, ProcessorMixin

from latefusion.models import base_model as base
from latefusion.models.attach import attach, attached
from latefusion.models.locate import check_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.models.student.entry import entry_of
from latefusion.models.student.restore import load
from latefusion.models.student.save import load_student, merge, merge_adapters, save_student
from latefusion.models.student.whole import LOOSE_ENTRY

PLAIN, RS, DORA = {}, {"rslora": True}, {"dora": True}
SCHEDULE = VisionSchedule(enter=2, exit=5, keep={4: 2})
PROJECTOR = {"internvl": "multi_modal_projector", "smolvlm": "connector"}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits


class StandIn(ProcessorMixin):
    """These models are given token ids and pixels."""

    def __init__(self):
        pass

    def save_pretrained(self, folder):
        pass


VARIANTS = pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llava", DORA),
        pytest.param("llava_next", RS, marks=pytest.mark.slow),
        pytest.param("llava_onevision", PLAIN, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", DORA, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", RS, marks=pytest.mark.slow),
        pytest.param("internvl", PLAIN, marks=pytest.mark.slow),
        ("smolvlm", DORA),
        ("gemma3", RS),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "lora"),
)


@pytest.fixture
def stand_in(monkeypatch):
    processor = StandIn()
    monkeypatch.setattr(base.AutoProcessor, "from_pretrained", lambda path, **settings: processor)
    return processor


def fresh(family):
    return prompt(family, ["tt I ttt", "t I t I tt"], side="right")


def saved_student(family, variant, folder, stand_in):
    """A shaken student of the family in `folder / "adapter"`, and its logits on `fresh(family)`."""
    build(family).save_pretrained(folder / "base")
    student = build_student(
        base.load_base(str(folder / "base"), dtype=torch.float32)[0],
        stand_in,
        base=str(folder / "base"),
        schedule=SCHEDULE,
        lora=Lora(rank=2, alpha=4, layers=[2, 3, 4], **variant),
        entry_rank=2,
        train=[PROJECTOR[family]] if family in PROJECTOR else [],
    )
    untrained = logits(student.model, fresh(family))
    shake(student, 0.1)
    expected = logits(student.model, fresh(family))
    real = fresh(family)["attention_mask"].bool()
    assert (expected - untrained)[real].abs().max() > 1e-2
    save_student(student, folder / "adapter")
    return expected, real


@VARIANTS
def test_a_student_keeps_its_logits_through_every_form(family, variant, tmp_path, stand_in):
    expected, real = saved_student(family, variant, tmp_path, stand_in)
    loaded, _ = load(tmp_path / "adapter", dtype=torch.float32, merge=False)
    assert torch.equal(logits(loaded, fresh(family)), expected)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    folder, folders = tmp_path / "adapter", [tmp_path / name for name in ("merged", "again", "and again")]
    for following in folders:  # the adapters merged as they are loaded, merged on disk, saved by stock saving
        model, _ = load(folder, dtype=torch.float32)
        assert not isinstance(model, PeftModel) and not any("lora" in name for name in model.state_dict())
        assert attached(model).policy == SCHEDULE and entry_of(model) is not None
        torch.testing.assert_close(logits(model, fresh(family))[real], expected[real], rtol=1e-5, atol=1e-5)
        if not following.exists():
            model.save_pretrained(following)
        assert [file.name for file in following.glob("*.safetensors")] == ["model.safetensors"]
        folder = following


@VARIANTS
def test_transformers_loads_a_merged_student_with_its_schedule(family, variant, tmp_path, stand_in):
    """Once latefusion is imported: by the Auto class, in every dtype the entry adapter stays in float32."""
    expected, real = saved_student(family, variant, tmp_path, stand_in)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert attached(model).policy == SCHEDULE and type(model) is type(build(family))
    torch.testing.assert_close(logits(model, fresh(family))[real], expected[real], rtol=1e-5, atol=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and entry_of(model).scale.dtype == torch.float32
    config = pickle.loads(pickle.dumps(model.config))  # vLLM sends it between processes
    assert type(config) is type(model.config) and config.to_json_string() == model.config.to_json_string()
    twice = AutoConfig.from_pretrained(tmp_path / "merged")
    twice.save_pretrained(tmp_path / "config")
    again = AutoConfig.from_pretrained(tmp_path / "config")
    again.name_or_path = twice.name_or_path
    assert again.to_dict() == twice.to_dict()


@VARIANTS
def test_a_student_without_its_entry_adapter_is_refused(family, variant, tmp_path, stand_in):
    """Its weights dropped from the file; or from the model, which then has no policy but the dense one."""
    saved_student(family, variant, tmp_path, stand_in)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    attached(model).detach()
    del model._modules["vision_entry"]
    with pytest.raises(
        ValueError, match=r"saved with an entry adapter.*load the folder with latefusion\.load"
    ):
        attach(model, SCHEDULE)
    with attach(model, VisionSchedule()) as dense, pytest.raises(ValueError, match="saved with an entry"):
        dense.using(SCHEDULE).__enter__()
    model.save_pretrained(tmp_path / "lost")
    for loading in (load, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(
            ValueError, match=r"needs its entry adapter .* but the checkpoint lacks its weights"
        ):
            loading(tmp_path / "lost", dtype=torch.float32)


def in_a_new_process(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


IN_TRANSFORMERS = """
import sys
{first}
from transformers import AutoModelForImageTextToText
{second}
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="float32", {settings})
from latefusion.models.attach import attached
print(attached(model).policy)
"""

WITHOUT_LATEFUSION = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "latefusion":
            raise ModuleNotFoundError(f"No module named '{name}'")
sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.slow
def test_a_merged_student_never_runs_dense_without_a_word(tmp_path, stand_in):
    """latefusion imported before or after transformers, or by trust_remote_code; without it a sentence."""
    folder, _, _ = merged_llava(tmp_path, stand_in)
    for parts in (
        {"first": "import latefusion", "second": "", "settings": ""},
        {"first": "", "second": "import latefusion", "settings": ""},
        {"first": "", "second": "", "settings": "trust_remote_code=True"},
    ):
        code, output, errors = in_a_new_process(IN_TRANSFORMERS.format(**parts), folder)
        assert not code and output.strip() == str(SCHEDULE), errors
    parts = {"first": "", "second": "", "settings": ""}
    code, _, errors = in_a_new_process(IN_TRANSFORMERS.format(**parts), folder)
    assert code and "contains custom code" in errors and "trust_remote_code=True" in errors
    parts = {"first": WITHOUT_LATEFUSION, "second": "", "settings": "trust_remote_code=True"}
    code, _, errors = in_a_new_process(IN_TRANSFORMERS.format(**parts), folder)
    assert code and "packages that were not found in your environment: latefusion" in errors
    assert "pip install latefusion" in errors
    parts = {"first": "", "second": "", "settings": ""}
    values = json.loads((folder / "config.json").read_text())
    del values["auto_map"]
    (folder / "config.json").write_text(json.dumps(values))
    code, _, errors = in_a_new_process(IN_TRANSFORMERS.format(**parts), folder)
    assert code and "model type `latefusion` but Transformers does not recognize this architecture" in errors


def test_importing_latefusion_does_not_import_transformers():
    code = "import sys, latefusion; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert in_a_new_process(code)[0] == 0


def merged_llava(folder, stand_in):
    expected, real = saved_student("llava", PLAIN, folder, stand_in)
    merge(folder / "adapter", folder / "merged", dtype=torch.float32)
    return folder / "merged", expected[real], real


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_folders_of_the_earlier_format_still_load(tmp_path, stand_in):
    """The entry adapter in a file of its own, and its sizes nowhere."""
    folder, expected, real = merged_llava(tmp_path, stand_in)
    weights = load_file(folder / "model.safetensors")
    entry = {name: weights.pop(name) for name in list(weights) if name.startswith("vision_entry.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({name.removeprefix("vision_entry."): w for name, w in entry.items()}, folder / LOOSE_ENTRY)
    config = json.loads((folder / "config.json").read_text())
    for name in ("vision_entry", "auto_map"):
        del config[name]
    config["model_type"] = config.pop("base_model_type")
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model, fresh("llava"))[real], expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "now")
    saved = json.loads((tmp_path / "now" / "config.json").read_text())
    assert saved["vision_entry"] == {"rank": 2, "places": 0}  # from now on it cannot get lost without a word


@pytest.mark.parametrize("sizes", [{"rank": 10**9, "places": 0}, {"rank": 2, "places": 4}, "2", [2]])
def test_sizes_that_are_not_the_weights_are_refused(sizes, tmp_path, stand_in):
    folder, _, _ = merged_llava(tmp_path, stand_in)
    edit(folder / "config.json", vision_entry=sizes)
    with pytest.raises(ValueError, match="the checkpoint holds one with"):
        load(folder, dtype=torch.float32)


def test_adapters_without_the_entry_that_they_trained_are_refused(tmp_path, stand_in):
    """As PEFT leaves them where the model had no such module."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if "vision_entry" not in name}, file)
    with pytest.raises(
        ValueError, match=r"was trained with an entry adapter, but adapter_model\.safetensors"
    ):
        load(tmp_path / "adapter", dtype=torch.float32)


def test_stock_peft_refuses_a_student_and_names_what_loads_it(tmp_path, stand_in):
    """It would leave out entry adapter and schedule without a word."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    model, _ = base.load_base(str(tmp_path / "base"), dtype=torch.float32)
    for refusing in (
        lambda: PeftModel.from_pretrained(model, tmp_path / "adapter"),
        lambda: PeftConfig.from_pretrained(tmp_path / "adapter"),
        lambda: AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter"),
    ):
        with pytest.raises(KeyError, match=r"load its folder with latefusion\.load, from pip install"):
            refusing()
    edit(tmp_path / "adapter" / "adapter_config.json", peft_type="LORA")  # of an earlier format
    load(tmp_path / "adapter", dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"peft_type": "PROMPT_TUNING"},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"base_model_name_or_path": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapter_settings_are_data(settings, tmp_path, stand_in):
    """PEFT imports the module that `megatron_core` names."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    edit(tmp_path / "adapter" / "adapter_config.json", **settings)
    with pytest.raises(ValueError, match=r"adapter_config\.json (sets|describes|is not)"):
        load(tmp_path / "adapter", dtype=torch.float32)
    assert "antigravity" not in sys.modules


def test_a_student_is_not_a_base(tmp_path, stand_in):
    """As one it would run dense, without its entry adapter."""
    folder, _, _ = merged_llava(tmp_path, stand_in)
    for refuses in (check_base, lambda path: base.load_base(path, dtype=torch.float32)):
        with pytest.raises(
            ValueError, match=r"is a trained student, not a base: load it with latefusion\.load"
        ):
            refuses(str(folder))


def test_what_bfloat16_rounds_away_is_said(tmp_path, stand_in):
    """Small changes vanish in 8 bits; larger ones are kept."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tmp_path / "adapter", dtype=torch.float32)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: w * (1e-4 if "lora_B" in name else 1) for name, w in weights.items()}, file)
    with pytest.warns(
        UserWarning, match=r"into bfloat16 rounds away \d\d% of what they changed; load it with dtype"
    ):
        load(tmp_path / "adapter", dtype=torch.bfloat16)
    student = load_student(tmp_path / "adapter", dtype=torch.float32)
    merged = merge_adapters(student)
    assert merged.lost == 0
    assert all(weight.requires_grad for weight in merged.model.parameters()), "as transformers loads a model"


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_logits_of_every_family(family, stand_in):
    number = FAMILIES.index(family)
    student = build_student(
        build(family),
        stand_in,
        base="",
        schedule=SCHEDULE,
        lora=Lora(rank=2, alpha=4, **(PLAIN, RS, DORA)[number % 3]),
        entry_rank=2,
    )
    shake(student, 0.1)
    expected = logits(student.model, fresh(family))
    done = merge_adapters(student)
    assert done.lost == 0 and done.changed > 6
    assert not torch.allclose(
        logits(done.model, fresh(family)), expected, atol=1e-2
    )  # dense without its policy
    with attach(done.model, SCHEDULE):
        real = fresh(family)["attention_mask"].bool()
        torch.testing.assert_close(
            logits(done.model, fresh(family))[real], expected[real], rtol=1e-5, atol=1e-5
        )


def test_code_that_comes_with_a_folder_is_not_run(tmp_path, stand_in):
    folder, _, _ = merged_llava(tmp_path, stand_in)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    edit(folder / "config.json", auto_map={name: "evil.Evil" for name in names})
    load(folder, dtype=torch.float32)
    for unknown in ({"base_model_type": "unheard_of"}, {"model_type": "unheard_of"}):
        edit(folder / "config.json", **unknown)
        with pytest.raises(
            ValueError, match="is of type 'unheard_of', which this transformers does not have"
        ):
            load(folder, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_published_student_loads_by_its_hub_id(tmp_path, stand_in, monkeypatch):
    """As its model card says."""
    folder, expected, real = merged_llava(tmp_path, stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", {"me/student": str(folder)}.__getitem__)
    model, _ = load("me/student", dtype=torch.float32)
    torch.testing.assert_close(logits(model, fresh("llava"))[real], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"no student at me/other: .* cannot be downloaded"):
        load("me/other")
