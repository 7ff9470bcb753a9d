"""Pictures as data sets hold them: each damage is named, each odd format becomes an upright RGB picture."""

import io
import os
from base64 import b64encode, encodebytes

import numpy as np
import pytest
from helpers.pictures import JPEG, PNG, decompression_bomb, encode, noise
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from latefusion.data.images import MAX_BYTES, MAX_PIXELS, BadImage, load_image
from latefusion.recipes.printable import printable


def test_a_name_cannot_turn_a_line_of_a_message_around():
    assert printable("a\u202egpj.exe\u2066") == "a\\u202egpj.exe\\u2066"
    hebrew = "\u05e9\u05dc\u05d5\u05dd \u200d"  # runs from right to left by itself
    assert printable(hebrew) == hebrew


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", r"an image is empty \(0 bytes\)"),
        ({"bytes": b"", "path": "a/b.jpg"}, r"a/b\.jpg is empty \(0 bytes\)"),
        (b"<html>404 not found</html>", r"is not an image \(26 bytes that begin with 3c 68 74 6d"),
        (JPEG[: len(JPEG) // 2], r"cannot be decoded \(.*truncated"),
        (PNG[: len(PNG) // 2], r"cannot be decoded \("),
        (PNG[:60] + bytes(20) + PNG[80:], r"cannot be decoded|is not an image"),
        (decompression_bomb(), rf"pixels, more than {MAX_PIXELS:,}|more than {MAX_PIXELS:,} pixels"),
        ("nowhere.png", r"nowhere\.png cannot be read \(No such file"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": None, "path": 5}, "has a path that is int"),
        ("https://x.org/a.png", r"https://x\.org/a\.png is an address; download the image and give its path"),
        ("data:image/png;base64,iVBOR", "iVBOR is a data URL that cannot be decoded"),
        (
            "data:image/svg+xml,<svg/>",
            r"a data URL that cannot be decoded \(its header does not end in ;base64",
        ),
        (
            f"data:image/png;base64,{b64encode(PNG[:60]).decode()}",
            "a data URL (cannot be decoded|is not an image)",
        ),
        (
            "iVBOR" * 999,
            r"^iVBOR.{56} of 4995 characters cannot be read \(File name too long: .{61} of \d+ characters\)$",
        ),
        ("a\0\n.png", r"a\\x00\\n\.png cannot be read \(embedded null byte"),
        (7, "is given as int"),
        (Image.fromarray(np.zeros((2, 2), np.float32)), "floating-point"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, source, reason):
    with pytest.raises(BadImage, match=reason) as error:
        load_image(source, tmp_path)
    assert "\n" not in str(error.value)


def test_no_file_is_waited_for_or_read_whole_that_cannot_be_an_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # of holes
    for name, reason in (("pipe.png", "a pipe or a device"), ("huge.png", r"1,600,000,001 bytes, more than")):
        with pytest.raises(BadImage, match=rf"{name} cannot be read \({reason}"):
            load_image(name, tmp_path)
    with pytest.raises(BadImage, match=r"/dev/zero cannot be read \(a pipe or a device"):
        load_image("/dev/zero")


def test_a_large_picture_below_the_limit_is_no_bomb(monkeypatch):
    monkeypatch.setattr("latefusion.data.images.MAX_PIXELS", 32 * 24)
    assert load_image(PNG).size == (32, 24)
    monkeypatch.setattr("latefusion.data.images.MAX_PIXELS", 32 * 24 - 1)
    with pytest.raises(BadImage, match="32 x 24 pixels, more than 767"):
        load_image(PNG)


def test_paths_bytes_and_pictures_are_the_same_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    pixels = np.asarray(noise())
    url = f"data:image/png;base64,{b64encode(PNG).decode()}"
    wrapped = f"data:;BASE64,{encodebytes(PNG).decode()}"  # in lines, as MIME has it
    sources = (
        "a.png",
        url,
        wrapped,
        {"bytes": None, "path": url},
        PNG,
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": "a.png"},
        noise(),
    )
    for source in (*sources, str(tmp_path / "a.png")):
        image = load_image(source, tmp_path)
        assert image.mode == "RGB" and (np.asarray(image) == pixels).all()


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 256 * 10, 256 * 200, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        image = load_image(encode(Image.fromarray(values), kind))
        assert image.mode == "RGB" and np.asarray(image)[0, :, 0].tolist() == [0, 10, 200, 255]
    with pytest.raises(BadImage, match="pixels from 0 to 70000"):
        load_image(Image.fromarray(np.array([[0, 70_000]], np.int32)))


def test_eight_bits_in_32_are_not_scaled_to_black():
    """Values below 256 in an image of 32 bits a pixel, as arrays of integers are often stored; 16 bits stay 16 bits."""
    values = [0, 10, 200, 255]
    assert np.asarray(load_image(Image.fromarray(np.array([values], np.int32))))[0, :, 0].tolist() == values
    assert np.asarray(load_image(Image.fromarray(np.array([values], np.uint16))))[0, :, 0].max() == 0


def test_exif_orientation_is_applied():
    upright = Image.new("RGB", (30, 20), (0, 0, 0))
    upright.paste((255, 0, 0), (0, 0, 30, 5))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    stored = encode(upright.rotate(90, expand=True), "JPEG", exif=exif, quality=95)
    assert Image.open(io.BytesIO(stored)).size == (20, 30)
    image = load_image(stored)
    assert image.size == (30, 20) and image.getpixel((15, 1))[0] > 200 > 50 > image.getpixel((15, 15))[0]


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        image = load_image(data)
        assert image.size == (8, 8) and image.getpixel((4, 4))[0] > 240 > 20 > image.getpixel((4, 4))[1]


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_colours_become_rgb(mode):
    image = load_image(encode(noise(mode), "JPEG"))
    assert image.mode == "RGB" and image.size == (32, 24)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_ink_becomes_the_colour_it_prints(kind):
    """Magenta and yellow ink on white paper are red, black ink is black; a JPEG of Adobe's holds them inverted."""
    for ink, colour in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0)), ((0,) * 4, (255,) * 3)):
        seen = load_image(encode(Image.new("CMYK", (8, 8), ink), kind)).getpixel((4, 4))
        assert np.abs(np.subtract(seen, colour)).max() < 12


def transparent_pictures() -> dict[str, bytes]:
    alpha = noise("L")
    coloured, palette = noise(), noise("L").convert("P")
    coloured.putalpha(alpha)
    grey = noise("L")
    grey.putalpha(alpha)
    return {
        "RGBA": encode(coloured, "PNG"),
        "LA": encode(grey, "PNG"),
        "WEBP": encode(coloured, "WEBP", lossless=True),
        "P, one colour clear": encode(palette, "PNG", transparency=3),
        "P, alpha of each colour": encode(palette, "PNG", transparency=bytes(range(256))),
        "L, one grey clear": encode(noise("L"), "PNG", transparency=int(np.asarray(noise("L"))[0, 0])),
        "RGB, one colour clear": encode(noise(), "PNG", transparency=noise().getpixel((0, 0))),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", transparent_pictures())
def test_transparency_is_laid_on_white_as_the_stock_processors_do(kind):
    data = transparent_pictures()[kind]
    image = load_image(data)
    assert image.mode == "RGB"
    assert (np.asarray(image) == convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)).all()


def test_what_is_black_on_clear_is_not_all_black():
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (2, 2, 6, 6))
    for image in (load_image(encode(picture, "PNG")), load_image(picture.convert("LA").convert("La"))):
        assert image.getpixel((0, 0)) == (255,) * 3 and image.getpixel((4, 4)) == (0,) * 3


def test_a_clear_grey_of_16_bits_is_white():
    values = np.array([[0, 256 * 10, 256 * 200]], np.uint16)
    image = load_image(encode(Image.fromarray(values), "PNG", transparency=0))
    assert np.asarray(image)[0, :, 0].tolist() == [255, 10, 200]


def test_black_and_white_become_rgb():
    seen = load_image(encode(noise("L").convert("1"), "PNG"))
    assert seen.mode == "RGB" and set(np.asarray(seen).flat) == {0, 255}
