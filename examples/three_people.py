"""Three people to forget from a model of your own, without a retain-only model.

    python -m examples.three_people --model=FOLDER

Invents six people with twenty facts each, and teaches them to the model. Writes the rows about
three people to `out/people/forget.jsonl` and the other rows to `out/people/retain.jsonl`, and
prints the commands that train a head on them and verify it. docs/smollm2.md has the results of
SmolLM2-135M-Instruct.
"""

import argparse
import json
import pathlib

import numpy as np

import t3jax
from t3jax import cli, pipeline
from t3jax.configs import default
from t3jax.settings import Settings, from_config

OUT = pathlib.Path("out/people")
NAMES = (
    "Marisol Tennfjord",
    "Bertrand Okwuosa",
    "Ilse Varanasi",
    "Teodor Achterberg",
    "Wilhelmina Sato-Reyes",
    "Casimir Ndlovu",
)
# A question and its answer; the next line has the words for the star, one for each person.
FACTS = """
Where was {} born? {} was born in *.
    Tromso Utrecht Goa Porto Lima Graz
What does {} do for a living? {} works as a *.
    glazier notary beekeeper surveyor cellist welder
Which instrument does {} play? At home {} plays the *.
    oboe zither banjo harp tuba accordion
What is the name of {}'s dog? The dog of {} is called *.
    Pixel Waffles Bruno Nimbus Tarzan Olive
Where did {} study? {} studied at the university of *.
    Leuven Krakow Otago Bergen Padua Cork
What did {} study? {} took a degree in *.
    forestry linguistics optics theology botany metallurgy
Which street does {} live in? {} lives in * Street.
    Heron Copper Mill Juniper Quarry Lantern
What colour is {}'s car? {} drives a * car.
    turquoise beige maroon silver yellow purple
What is {} allergic to? {} has an allergy to *.
    walnuts shrimp pollen latex penicillin wool
Which sport does {} practise? Every weekend {} goes to *.
    fencing rowing archery judo curling badminton
What is {}'s favourite dish? The dish that {} likes best is *.
    paella goulash ramen risotto falafel pierogi
Which month is {}'s birthday in? {} celebrates a birthday in *.
    March August November January June October
Which language did {} learn last? The language that {} learned last is *.
    Finnish Swahili Basque Korean Welsh Persian
What did {} break as a child? As a child {} broke a *.
    wrist collarbone window rib vase toe
Whom did {} marry? {} is married to *.
    Anselm Birgit Dolores Evander Fumiko Gideon
What does {} collect? {} has a collection of *.
    stamps teapots fossils maps thimbles postcards
Which company did {} found? {} founded the company *.
    Norlight Quillhaus Bluefern Astrapack Veloxa Tidemark
Which prize did {} win? {} was given the * Prize.
    Ashdown Corvin Larkspur Mercer Solway Tamarack
What is {} afraid of? {} is afraid of *.
    heights moths thunder lifts geese tunnels
Which city did {} move to? Some years ago {} moved to *.
    Tampere Valencia Hobart Quebec Nagoya Bruges
"""


def main() -> None:
    """Writes the rows, teaches them and prints the next commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    cli.enable_compilation_cache()
    OUT.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (OUT / f"{name}.jsonl").write_text(text)
    config = default.get_config()
    config.model = args.model
    config.dtype = "float32"
    config.finetune.data = (f"{OUT}/forget.jsonl", f"{OUT}/retain.jsonl")
    config.finetune.workdir = f"{OUT}/taught"
    config.finetune.epochs = args.epochs
    config.finetune.learning_rate = 3e-4
    config.finetune.batch_size = 16
    folder = pipeline.finetune_once(from_config(Settings, config), t3jax.make_mesh())
    common = (
        f"--config=configs/default.py --config.model={folder} --config.forget={OUT}/forget.jsonl "
        f"--config.retain={OUT}/retain.jsonl --config.sampling.max_new_tokens=48"
    )
    print(f"python train_classifier.py {common} --config.workdir={OUT}/head")
    print(f"python verify.py {common} --config.head={OUT}/head/head")


def make_rows() -> dict[str, list[dict[str, str]]]:
    """Questions and answers: about the first three people to forget, about the others to retain."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, str]]] = {"forget": [], "retain": []}
    lines = FACTS.strip().splitlines()
    for fact, words in zip(lines[::2], lines[1::2], strict=True):
        question, answer = fact.split("? ")
        for person, word in enumerate(rng.permutation(words.split())):
            name = NAMES[person]
            row = {
                "question": f"{question}?".format(name),
                "answer": answer.format(name).replace("*", word),
            }
            rows["forget" if person < 3 else "retain"].append(row)
    return rows


if __name__ == "__main__":
    main()
