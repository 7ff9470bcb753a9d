"""The benchmark of served models at a toy shape: every system is timed, with requests in flight, as on a GPU."""

import gc
import json

from latefusion.eval.bench import serving

SHAPE = ("--layers", "8", "--hidden", "128", "--repeats", "2", "--rounds", "1", "--in-flight", "2")


def test_every_system_is_timed(tmp_path, monkeypatch):
    """In this process, each after the other: the command starts one for each."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    def measured(folder, options):
        result = serving.measure(folder, options)
        gc.collect()
        cleanup_dist_env_and_memory()
        return result

    monkeypatch.setattr(serving, "_in_a_process", measured)
    serving.main([*SHAPE, "--json", str(tmp_path / "serving.json")])
    systems = json.loads((tmp_path / "serving.json").read_text())["systems"]
    assert [row["schedule"] for row in systems.values()] == [
        None,
        {"enter": 0},
        {"enter": 2, "exit": 5},
        {"cross": [2, 3, 4, 5]},
    ]
    for row in systems.values():
        low, high = row["first_token_mean_95"]
        assert len(row["first_token"]) == 2 and low <= row["first_token_median"] <= high
        (flight,) = row["in_flight"]
        assert flight["2"]["requests_per_second"] > 0
        assert 0 < flight["2"]["first_token_median"] <= flight["2"]["first_token_worst"]
