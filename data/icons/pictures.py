"""The drawings: 60 named objects in four art styles, taken from npm packages into a cache folder.

Licences of the drawings: Noto Emoji Apache-2.0, Twemoji CC-BY 4.0, Fluent Emoji MIT, EmojiOne 2 CC-BY 4.0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

PACKAGES = (
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter@16.0.0",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "emojione@2.2.7",
)
STYLES = {  # style -> path of a drawing below node_modules, by the code point of its emoji
    "noto": "emoji-datasource-google/img/google/64/{code}.png",
    "twemoji": "emoji-datasource-twitter/img/twitter/64/{code}.png",
    "fluent": "@lobehub/fluent-emoji-3d/assets/{code}.webp",
    "emojione": "emojione/assets/png_128x128/{code}.png",
}
CATEGORIES: dict[str, dict[str, str]] = {  # category -> name -> code point; each name is one token of SmolLM2
    "animal": {
        "dog": "1f436", "cat": "1f431", "tiger": "1f42f", "rabbit": "1f430", "whale": "1f433",
        "snail": "1f40c", "snake": "1f40d", "horse": "1f40e", "sheep": "1f411", "monkey": "1f412",
        "pig": "1f437", "elephant": "1f418", "octopus": "1f419", "bee": "1f41d", "fish": "1f41f",
        "turtle": "1f422", "penguin": "1f427", "frog": "1f438", "spider": "1f577", "crab": "1f980",
        "eagle": "1f985", "butterfly": "1f98b",
    },
    "food": {
        "corn": "1f33d", "grapes": "1f347", "watermelon": "1f349", "lemon": "1f34b", "banana": "1f34c",
        "pineapple": "1f34d", "apple": "1f34e", "pear": "1f350", "strawberry": "1f353", "pizza": "1f355",
        "cookie": "1f36a", "cake": "1f370", "carrot": "1f955", "cheese": "1f9c0",
    },
    "vehicle": {
        "rocket": "1f680", "helicopter": "1f681", "bus": "1f68c", "car": "1f697", "tractor": "1f69c",
        "bicycle": "1f6b2", "airplane": "2708", "boat": "26f5",
    },
    "tool": {
        "hammer": "1f528", "wrench": "1f527", "scissors": "2702", "key": "1f511", "knife": "1f52a",
    },
    "instrument": {
        "guitar": "1f3b8", "trumpet": "1f3ba", "violin": "1f3bb", "drum": "1f941", "piano": "1f3b9",
    },
    "garment": {
        "shirt": "1f455", "dress": "1f457", "hat": "1f3a9", "crown": "1f451", "tie": "1f454", "boot": "1f462",
    },
}  # fmt: skip
CATEGORY_OF = {name: category for category, codes in CATEGORIES.items() for name in codes}
NAMES = tuple(CATEGORY_OF)


class Drawing(NamedTuple):
    """One object in one art style."""

    name: str
    style: str


def held_out_style(name: str) -> str:
    """The style in which training never shows an object: each style for a quarter of the objects."""
    return tuple(STYLES)[NAMES.index(name) % len(STYLES)]


def drawings(held_out: bool) -> list[Drawing]:
    """The drawings that training never shows (60), or those that it does (180)."""
    return [
        Drawing(name, style)
        for name in NAMES
        for style in STYLES
        if (style == held_out_style(name)) == held_out
    ]


def cache_folder() -> Path:
    """Where the packages are kept: $LATEFUSION_ICONS, or latefusion/icons in the user's cache folder."""
    if chosen := os.environ.get("LATEFUSION_ICONS"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latefusion" / "icons"


def check_drawings() -> list[str]:
    """The packages that `install` has to fetch; raises FileNotFoundError, in one sentence, if it cannot."""
    folder = cache_folder() / "node_modules"
    missing = [p for p in PACKAGES if not (folder / p.rpartition("@")[0] / "package.json").is_file()]
    if missing and shutil.which("npm") is None:
        raise FileNotFoundError(
            "the drawings of data=icons come from npm packages, and npm is not installed; install Node.js, or unpack "
            f"{', '.join(missing)} into {folder} ($LATEFUSION_ICONS names another folder)."
        )
    return missing


def install() -> Path:
    """Install the packages of drawings with npm unless they are there; return their folder."""
    folder = cache_folder() / "node_modules"
    missing = check_drawings()
    if not missing:
        return folder
    print(f"installing {', '.join(missing)} into {folder.parent} (about a minute, 310 MB)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), "no reason given")
        raise FileNotFoundError(
            f"npm could not install the drawings of data=icons ({reason}); check its network and registry, or unpack "
            f"{', '.join(missing)} into {folder} ($LATEFUSION_ICONS names another folder)."
        )
    return folder


@cache
def picture(drawing: Drawing) -> Image.Image:
    """A drawing with its transparency."""
    code = CATEGORIES[CATEGORY_OF[drawing.name]][drawing.name]
    for spelling in (code, f"{code}-fe0f"):
        path = install() / STYLES[drawing.style].format(code=spelling)
        if path.is_file():
            return Image.open(path).convert("RGBA")
    raise FileNotFoundError(f"no drawing of {drawing.name} in the style {drawing.style}: {path} is missing")
