"""Writes docs/results/families.json, docs/families.md and models/exact_decoders.json, which `attach` reads.

`python tests/helpers/families_table.py [ROW ...]`
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs/results/families.json", ROOT / "docs/families.md"
CLASSES = ROOT / "models/exact_decoders.json"
COMMAND = "python tests/helpers/families_table.py"

HEAD = """# Families of models

Every image-text-to-text type of transformers {version}, as a tiny random model, against its own
full-length forward with masks that hide the same tokens. *Exact* means: logits of the text equal to
float error in one forward, on a cache and in `generate`; a policy that keeps everything gives the
same bits. What has not been shown exact is refused by `lf.attach` with the sentence below.

**A decoder that is not on this page** (code of your own, a subclass, a type that transformers gets
tomorrow) is tried on its own weights when a policy is attached: two rows of a dozen random tokens,
some of which leave, against its own full-length forward with masks. That takes a dozen short
forwards; weights, modes and random numbers stay as they are. If the text comes out differently by
more than rounding, or the decoder cannot be tried (weights in shards of ZeRO-3 or FSDP, or on the
meta device), `lf.attach` refuses it in a sentence; `lf.attach(model, policy, check=False)` trusts
it. The try also compares attention weights with the attention's output, for policies that rank, and
freezes vision tokens, for `cross`. What begins behind a dozen tokens (a scale of long contexts) it
does not see, and in 16 bits it counts an error from five times the rounding of the machine.

`tests/models/test_every_type.py` builds and checks each row, and this command writes this page:
`{command}`. A row with a comma is a type around another
decoder, or with options of its published checkpoints. *Images*: `placeholders` are found by the
token that stands for them; with `vision_mask` the model's own path of images was not run, and the
mask said what is vision.
"""

TURNS = (
    "**Separate questions in a row** (`data.isolate=true`, which `data=scenes`, `icons` and `easy_vqa` set) need a "
    "mask and positions of their own. Where positions have several axes (M-RoPE), where image tokens see each other "
    "both ways, or where a recurrence reads one question after the other, the answers would change, and the run is "
    "refused. They are those of a row each in: "
)


def wrapped(text: str) -> list[str]:
    """The text in lines of the page's width."""
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def turns(results: dict[str, Any]) -> list[str]:
    """The types whose turns `data.isolate` keeps apart exactly, under each decoder that was tried."""
    of_type: dict[str, list[bool]] = {}
    for name, row in results["rows"].items():
        if row["exact"]:
            of_type.setdefault(name.partition(",")[0], []).append(row["turns"])
    return [name for name, apart in of_type.items() if all(apart)]


def page(results: dict[str, Any]) -> str:
    """docs/families.md."""
    rows = results["rows"]
    whole = {name: row for name, row in rows.items() if row["exact"] and not row["refused"]}
    some = {name: row for name, row in rows.items() if row["exact"] and row["refused"]}
    none: dict[str, list[str]] = {}
    for name, row in rows.items():
        if not row["exact"]:
            none.setdefault(row["refused"]["all"], []).append(name)
    refused = sum(map(len, none.values()))
    lines = [
        HEAD.format(version=results["transformers"], command=COMMAND),
        *wrapped(TURNS + ", ".join(turns(results)) + "."),
        "",
        f"Of {len(rows)} rows, {len(whole)} are exact under every policy, {len(some)} under some, {refused} are "
        "refused.",
        "",
        "## Exact under every policy",
        "",
        "| type | decoder | images |",
        "| --- | --- | --- |",
        *[f"| {name} | {row['decoder']} | {images(row)} |" for name, row in whole.items()],
        "",
        "## Exact under some",
        "",
        "| type | decoder | exact | refused |",
        "| --- | --- | --- | --- |",
        *[
            f"| {name} | {row['decoder']} | {', '.join(row['exact'])} | {reasons(row['refused'])} |"
            for name, row in some.items()
        ],
        "",
        "## Refused",
        "",
        "| types | what `attach` says |",
        "| --- | --- |",
        *[f"| {'; '.join(names)} | {reason} |" for reason, names in none.items()],
        "",
    ]
    return "\n".join(lines)


def classes(results: dict[str, Any]) -> dict[str, Any]:
    """models/exact_decoders.json: each decoder that is exact, with the classes of its layers and of their parts."""
    decoders: dict[str, set[str]] = {}
    for row in results["rows"].values():
        if row["exact"]:
            decoders.setdefault(row["classes"][0], set()).update(row["classes"])
    return {
        "transformers": results["transformers"],
        "command": COMMAND,
        "turns": turns(results),
        "decoders": {name: sorted(parts) for name, parts in sorted(decoders.items())},
    }


def images(row: dict[str, Any]) -> str:
    """How the row's vision tokens were told."""
    return f"`{row['images']}`" if "images" in row else "placeholders"


def reasons(refused: dict[str, str]) -> str:
    """Each reason once, after the policies that it refuses."""
    policies: dict[str, list[str]] = {}
    for policy, reason in refused.items():
        policies.setdefault(reason, []).append(policy)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in policies.items())


def main(names: list[str]) -> None:
    """Check the rows (all, or those named) and write the file and the page."""
    import transformers
    from helpers.judged_types import judged
    from helpers.tiny_types import ROWS

    rows = json.loads(RESULTS.read_text())["rows"] if names else {}
    for name in names or ROWS:
        rows[name] = judged(name)
        print(name, rows[name])
    results = {
        "transformers": transformers.__version__,
        "command": COMMAND,
        "rows": {name: rows[name] for name in ROWS if name in rows},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    CLASSES.write_text(json.dumps(classes(results), indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main(sys.argv[1:])
