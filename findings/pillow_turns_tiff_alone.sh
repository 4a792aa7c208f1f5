#!/usr/bin/env bash
# Pillow turns a TIFF upright by itself when it loads it, and no other format.
#
# Guess: an orientation tag is metadata in every format: `Image.open(...)` gives the pixels as stored, and whoever wants
# them upright asks `ImageOps.exif_transpose`; so code that reads the tag first and turns the pixels after is right.
# So is: for TIFF the size is that of the upright image as soon as the file is open, loading turns the pixels and takes
# the tag away. The tag read before loading says "turn" of pixels that are upright once they are there: they are turned
# twice. JPEG, PNG, WebP and AVIF with the same tag are left as stored. Loading first and then reading the tag is right
# for all five.
# Seen with pillow 12.3.0 on Python 3.11. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet 'pillow==12.3.0'
"$folder/env/bin/python" - <<'PYTHON'
import io

from PIL import ExifTags, Image

TURN = 6  # stored lying on its left side: to be turned a quarter clockwise
stored = Image.new("RGB", (64, 32), "red")
stored.paste("blue", (32, 0, 64, 32))
exif = Image.Exif()
exif[ExifTags.Base.Orientation] = TURN

turned_by_itself = []
for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF"):
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif.tobytes())
    image = Image.open(buffer)
    before = image.size, image.getexif().get(ExifTags.Base.Orientation)
    image.load()
    after = image.size, image.getexif().get(ExifTags.Base.Orientation)
    print(f"{kind}: opened {before[0]}, tag {before[1]}; loaded {after[0]}, tag {after[1]}")
    assert before[1] == TURN
    if after != ((64, 32), TURN):
        assert after == ((32, 64), None)
        top, bottom = image.convert("RGB").getpixel((16, 4)), image.convert("RGB").getpixel((16, 60))
        assert top[0] > 200 > top[2] and bottom[2] > 200 > bottom[0]  # red above blue: upright
        turned_by_itself.append(kind)
if turned_by_itself != ["TIFF"]:
    raise SystemExit(f"Pillow turns {turned_by_itself} by itself now: this finding is out of date")
PYTHON
