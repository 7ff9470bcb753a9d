"""What a profile's folder holds is data: a damaged file is one sentence, and no tag in it runs."""

import pytest
import torch
from safetensors.torch import save_file

from latefusion.models.profile_folder import ENTRY_FILE, read_entry
from latefusion.models.profile_schedule import SCHEDULE_FILE, read_schedule


@pytest.mark.parametrize("text", ["enter: [1", "enter: !!python/object/apply:os.getcwd []", "enter: 1: 2"])
def test_a_schedule_that_is_not_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / SCHEDULE_FILE).write_text(text)
    with pytest.raises(ValueError, match="is not a schedule in YAML") as error:
        read_schedule(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tensors", [None, {"weight": torch.zeros(2)}, {"bias": torch.zeros(2)}])
def test_a_damaged_entry_is_one_sentence(tmp_path, tensors):
    if tensors is None:
        (tmp_path / ENTRY_FILE).write_bytes(b"no tensors")
    else:
        save_file(tensors, tmp_path / ENTRY_FILE)
    with pytest.raises(ValueError, match="is damaged; profile the model again"):
        read_entry(tmp_path, weights="x")
