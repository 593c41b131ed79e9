"""Real photographs to try one's first training on: eight pictures that come with scikit-image and scikit-learn, cut up.

    pip install scikit-image
    python examples/photo_crops.py photos

writes a folder per picture with 150 square crops in each, of half to all of the picture's height, from anywhere in it:
JPEG files of many sizes, as folders of photographs are. Crops of one picture overlap, so what is held out is never
quite new: good for looking at a model, too kind for judging one.
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

PICTURES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut eight photographs into folders of square crops.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=150, help="crops of each picture")
    options = parser.parse_args()
    chosen = random.Random(0)
    for name, (package, file) in PICTURES.items():
        found = find_spec(package)
        if found is None or not found.submodule_search_locations:
            parser.error(f"the pictures of {package} are not there; install them with: pip install scikit-image")
        picture = Image.open(Path(found.submodule_search_locations[0]) / file).convert("RGB")
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(options.each):
            side = round(min(picture.size) * chosen.uniform(0.5, 1))
            left, top = (chosen.randint(0, length - side) for length in picture.size)
            picture.crop((left, top, left + side, top + side)).save(folder / f"{number:03d}.jpg", quality=92)
    print(f"{len(PICTURES) * options.each} crops in {options.out}")


if __name__ == "__main__":
    main()
