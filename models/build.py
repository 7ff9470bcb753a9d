"""Base model, student, and what is saved of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from latefusion.models import embedded
from latefusion.models.attach import Attachment, attach
from latefusion.models.entry import ENTRY, CalibratedEntry, entry_of, entry_shape, install_entry
from latefusion.models.schedule import SCHEDULE_FILE, VisionSchedule

EMBEDDED = "embedded"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENTRY_WEIGHTS = f"{ENTRY}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Student:
    """A late-fusion model: base, LoRA and entry adapter in one PEFT model, with its schedule attached.

    The base under any policy, the teacher among them, is the same object inside `model.disable_adapter()`. Where all
    weights train there are no adapters: `model` is the Hugging Face model itself, and its base is gone.
    """

    model: Any
    processor: ProcessorMixin
    attachment: Attachment
    schedule: VisionSchedule


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_base(
    path: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    processor: Mapping[str, Any] | None = None,
    four_bits: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A base model and its processor: `embedded`, a local folder, or a hub id.

    Args:
        dtype: of the weights, or with `four_bits` of what is computed with them.
        revision: branch, tag or commit of a hub id; None: its main branch.
        processor: settings that the processor is loaded with (`max_pixels`, ...).
        four_bits: hold the decoder in NF4 (QLoRA, arXiv 2305.14314); the rest stays as it is.
        trust_remote_code: run code that comes with the weights.

    Raises:
        FileNotFoundError: there are no such weights, or they cannot be reached from here.
        ValueError: 4 bits need a package that is not here.
    """
    if path == EMBEDDED:
        if four_bits:
            raise ValueError(
                "model.load_in_4bit=true is for large models; model=embedded has 5 million weights."
            )
        return embedded.load_base(dtype)
    check_base(path)
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    more = {"quantization_config": _nf4(path, dtype, where)} if four_bits else {}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **where, **more)
    return model.eval(), AutoProcessor.from_pretrained(path, **where, **(processor or {}))


def _nf4(path: str, dtype: torch.dtype, where: dict[str, Any]) -> BitsAndBytesConfig:
    """Four bits for the decoder's layers alone: what trains in full cannot be quantised."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("model.load_in_4bit=true needs bitsandbytes: pip install bitsandbytes.")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path, **where))
    decoder = model.get_decoder()
    parts = {module for module in model.base_model.children() if module is not decoder}
    others = [
        name for name, module in model.named_modules() if module in parts
    ]  # whole names, as it compares them
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*others, "lm_head"],
    )


def check_base(path: str) -> None:
    """Raise FileNotFoundError, in one sentence, where `load_base` cannot find its weights."""
    if path == EMBEDDED or (Path(path) / "config.json").is_file():
        return
    fix = f"name a folder or hub id with model.path=..., or run `hf download {path}` where there is a network"
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"no model at {path}: it has no config.json; {fix}.")
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    try:
        HfApi().model_info(path, timeout=10)
    except Exception as error:  # every way a network, a hub or a name can fail
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"the weights of {path} are not on this machine and cannot be downloaded ({reason}); {fix}."
        ) from None


def decoder_linears(
    model: PreTrainedModel, names: Sequence[str] | None = None, among: Sequence[int] | None = None
) -> str:
    """A regular expression of the decoder layers' linear modules.

    Args:
        names: picks among their last names.
        among: picks among the layers.
    """
    layers = model.get_decoder().layers
    root = next(name for name, module in model.named_modules() if module is layers)
    found = sorted(
        {name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear) and name}
    )
    for name in names or ():
        if name not in found:
            raise ValueError(
                f"lora.targets names {name!r}, but the decoder's linear layers are {', '.join(found)}."
            )
    index = r"\d+" if among is None else f"({'|'.join(map(str, among))})"
    return rf"{re.escape(root)}\.{index}\.(.*\.)?({'|'.join(map(re.escape, names or found))})"


def build_student(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    base: str,
    schedule: VisionSchedule,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    dora: bool = False,
    entry_rank: int | None = None,
    calibrated: CalibratedEntry | None = None,
    train: Sequence[str] = (),
) -> Student:
    """Freeze `model` and put LoRA, entry adapter and schedule on it.

    Args:
        base: what `load_base` found the model by; written into the adapter's configuration.
        rank, alpha, dropout, targets, layers: LoRA's; `targets` None: every linear layer, `layers` None: of every
            decoder layer, empty: of none (only `train` and the entry adapter learn).
        rslora: scale by `alpha / sqrt(rank)` (arXiv 2312.03732); dora: learn magnitudes apart (arXiv 2402.09353).
        entry_rank: of the entry adapter, 0: a scale alone, None: no adapter; there is none either if the schedule
            enters at layer 0.
        calibrated: what the entry adapter starts from, if there is one.
        train: names of further modules to train in full (the projector).

    Raises:
        ValueError: nothing would train, or the schedule does not fit.
    """
    schedule.validate(model.config.get_text_config().num_hidden_layers)
    saved = [*train, *_with_entry(model, schedule, entry_rank, calibrated)]
    if layers is not None and not layers and not saved:
        raise ValueError(
            "tune=align trains projector and entry adapter, but this model names no projector and the schedule enters "
            "at layer 0; set model.projector=NAME."
        )
    none = layers is not None and not layers
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=DUMMY_TARGET_MODULES if none else decoder_linears(model, targets, layers),
        modules_to_save=saved or None,
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(model, config)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # masters; PEFT does so for LoRA only
    config.base_model_name_or_path = base  # PEFT writes the folder that the weights came from
    return Student(
        model=student, processor=processor, attachment=attach(student, schedule), schedule=schedule
    )


def build_full(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    schedule: VisionSchedule,
    entry_rank: int | None = None,
    calibrated: CalibratedEntry | None = None,
    train: Sequence[str] = (),
) -> Student:
    """A student whose decoder, output head, entry adapter and modules `train` all learn; see `build_student`."""
    schedule.validate(model.config.get_text_config().num_hidden_layers)
    names = (*train, *_with_entry(model, schedule, entry_rank, calibrated))
    model.requires_grad_(False)
    modules = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    for module in (model.get_decoder(), model.get_output_embeddings(), *modules):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # masters
    return Student(model=model, processor=processor, attachment=attach(model, schedule), schedule=schedule)


def _with_entry(
    model: PreTrainedModel, schedule: VisionSchedule, rank: int | None, calibrated: CalibratedEntry | None
) -> list[str]:
    """The names of the entry adapter, which is installed if the schedule wants one."""
    if rank is None or schedule.enter == 0:
        return []
    entry = install_entry(model, rank, 0 if calibrated is None else len(calibrated.bias))
    if calibrated is not None and entry.start is not None:
        entry.start.load_state_dict(calibrated.state_dict())
    return [ENTRY]


def start_from(student: Student, folder: str | Path) -> None:
    """Give a new student the weights that an earlier one trained (`recipe=align`, say), its teacher left as it is.

    Raises:
        FileNotFoundError: the folder holds no student.
        ValueError: the new student has no place for some of them.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"no student at {folder}: it has no {ADAPTER_CONFIG}; name a folder with init=FOLDER."
        )
    if not isinstance(student.model, PeftModel):
        raise ValueError("init=FOLDER needs adapters to put the weights in; use tune=lora or tune=align.")
    trained: Any = student.model.peft_config["default"]
    mine = set(trained.modules_to_save or ())
    earlier = vars(PeftConfig.from_pretrained(str(path)))
    for name in earlier["modules_to_save"] or ():
        if name not in mine:
            raise ValueError(
                f"the student at {folder} trained {name}, which this one does not; set "
                f"{'entry.kind and schedule.enter' if name == ENTRY else 'lora.train_projector=true'} as there."
            )
    try:
        found: Any = set_peft_model_state_dict(student.model, load_file(path / ADAPTER_WEIGHTS))
        unknown = found.unexpected_keys
    except RuntimeError as error:
        raise ValueError(
            f"the student at {folder} has weights of other shapes: {str(error).splitlines()[-1]}"
        ) from None
    if unknown:
        raise ValueError(f"the student at {folder} trained {unknown[0]}, which this one does not have.")


def save_student(student: Student, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """A PEFT adapter folder with `vision_schedule.json` and the processor beside it; `load` reads it.

    Of a student without adapters, what `merge` would write.

    Args:
        state_dict: the model's, where an engine has gathered it from shards.
    """
    if isinstance(student.model, PeftModel):
        student.model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    else:
        _save_whole(student.model, student.schedule, folder, state_dict)
    student.processor.save_pretrained(folder)
    student.schedule.save(folder)


def _save_whole(
    model: Any, schedule: VisionSchedule, folder: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """A plain checkpoint whose configuration carries the schedule, the entry adapter's weights beside it."""
    weights = state_dict if state_dict is not None else model.state_dict()
    entry = {name.partition(f"{ENTRY}.")[2]: w for name, w in weights.items() if name.startswith(f"{ENTRY}.")}
    plain = {name: w for name, w in weights.items() if not name.startswith(f"{ENTRY}.")}
    model.config.vision_schedule = schedule.to_dict()
    model.save_pretrained(folder, state_dict=plain)
    if entry:
        save_file({name: w.contiguous().cpu() for name, w in entry.items()}, Path(folder) / ENTRY_WEIGHTS)


def load_entry(model: PreTrainedModel, folder: str | Path) -> None:
    """The entry adapter that lies beside a plain checkpoint, if one does, installed in its model."""
    if not (Path(folder) / ENTRY_WEIGHTS).is_file():
        return
    weights = load_file(Path(folder) / ENTRY_WEIGHTS)
    entry = entry_of(model)
    if entry is None:
        shapes = {name: weight.shape for name, weight in weights.items()}
        entry = install_entry(model, *entry_shape(shapes))
    entry.load_state_dict(weights)


def load_student(path: str | Path, *, dtype: torch.dtype | None = None) -> Student:
    """A student from the adapter folder that `save_student` wrote, for inference.

    Raises:
        FileNotFoundError: the folder holds no student, or its base is not there.
    """
    folder = Path(path)
    for name in (ADAPTER_CONFIG, SCHEDULE_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no student at {path}: it has no {name}; name a folder that training wrote."
            )
    config = PeftConfig.from_pretrained(str(folder))
    model, _ = load_base(config.base_model_name_or_path, dtype=dtype or compute_dtype())
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    entries = {name.partition(f"{ENTRY}.")[2]: shape for name, shape in shapes.items() if f"{ENTRY}." in name}
    if entries:
        install_entry(model, *entry_shape(entries))
    student = PeftModel.from_pretrained(model, str(folder)).eval()
    schedule = VisionSchedule.load(folder)
    return Student(
        model=student,
        processor=AutoProcessor.from_pretrained(folder),
        attachment=attach(student, schedule),
        schedule=schedule,
    )


def merge(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Write the student at `source` as a plain Hugging Face checkpoint, LoRA merged, to `target`.

    Its `config.json` carries the schedule as `vision_schedule`; the entry adapter lies beside the weights,
    so any stock class loads the folder (and runs it dense). `load` restores both.

    Returns:
        How many of the base's tensors have changed, and how many it has.

    Raises:
        ValueError: none has: adapters that never trained, or changes too small for the dtype of the weights.
    """
    student = load_student(source, dtype=dtype)
    student.attachment.detach()
    before = fingerprints(student.model.get_base_model())
    model = student.model.merge_and_unload()
    after = fingerprints(model)
    changed = sum(after[name] != before[name] for name in before)
    if before.keys() != after.keys():
        raise ValueError(
            f"merging {source} left other weights than the base has; is its adapter of this model?"
        )
    if not changed:
        raise ValueError(
            f"merging {source} changed no weight of its base: its adapters never trained, or their changes are too "
            f"small for {str(model.dtype).removeprefix('torch.')}; merge in float32."
        )
    _save_whole(model, student.schedule, target)
    student.processor.save_pretrained(target)
    return changed, len(before)


def fingerprints(model: Any) -> dict[str, int]:
    """A checksum of every weight of the base inside `model`, adapters left out, by the base's own names."""
    found = {}
    for name, weight in model.state_dict().items():
        if ENTRY in name or "lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, ProcessorMixin]:
    """A trained late-fusion model, its schedule attached, and its processor.

    Args:
        path: a folder of `training/train.py` (PEFT adapter) or of `merge` (plain checkpoint).
        dtype: of the base's weights; None: bfloat16 where the hardware has it, else float32.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        student = load_student(folder, dtype=dtype)
        return student.model, student.processor
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: it has neither {ADAPTER_CONFIG} nor config.json; name a folder that "
            "training wrote."
        )
    model, processor = load_base(str(folder), dtype=dtype or compute_dtype())
    if not hasattr(model.config, "vision_schedule"):
        raise FileNotFoundError(
            f"the model at {path} carries no vision schedule; load it with transformers and attach one."
        )
    load_entry(model, folder)
    attach(model, VisionSchedule.from_dict(model.config.vision_schedule))
    return model, processor
