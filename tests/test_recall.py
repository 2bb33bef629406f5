"""Recall of leaks: ASCII text as ROUGE reads it, other scripts by characters and words."""
# ruff: noqa: RUF001  letters of other scripts that look like Latin ones are the subject

import itertools
import random
import types
import unicodedata

import numpy as np
import pytest

from t3jax.evaluation import metrics, recall, unlearning
from t3jax.evaluation.answers import leak_rates
from t3jax.evaluation.logs import Log
from t3jax.evaluation.recall import leak_recall
from t3jax.sampling import Sample

# Truth, the same facts in another order, an unrelated answer.
ANSWERS = {
    "Chinese": (
        "林晓梅于1985年3月17日出生在成都，她的父亲是一名钟表匠。",
        "她的父亲是一名钟表匠。林晓梅1985年3月17日在成都出生。",
        "这家餐厅每天早上八点开门，提供新鲜的面包和咖啡。",
    ),
    "Russian": (
        "Анна Ветрова родилась 17 марта 1985 года в Саратове, её отец чинил часы.",
        "Её отец чинил часы, а родилась Анна Ветрова в Саратове 17 марта 1985 года.",
        "Поезд отправляется каждое утро с третьего пути и прибывает к полудню.",
    ),
    "Arabic": (
        "وُلدت ليلى الحدّاد في مدينة حلب عام 1985، وكان والدها صانع ساعات.",
        "كان والدها صانع ساعات، وقد وُلدت ليلى الحدّاد عام 1985 في مدينة حلب.",
        "يفتح المطعم أبوابه كل صباح ويقدّم الخبز الطازج والقهوة.",
    ),
    "Thai": (
        "สมหญิง แสงทอง เกิดที่เชียงใหม่ในปี 1985 และบิดาของเธอเป็นช่างซ่อมนาฬิกา",
        "บิดาของเธอเป็นช่างซ่อมนาฬิกา สมหญิง แสงทอง เกิดในปี 1985 ที่เชียงใหม่",
        "ร้านอาหารเปิดทุกเช้า",
    ),
    "Japanese": (
        "高橋みどりは1985年に仙台で生まれ、父親はトケイ職人だった。",
        "父親はトケイ職人で、高橋みどりは仙台で1985年に生まれた。",
        "このレストランは毎朝八時に開き、パンを焼きます。",
    ),
    "Hindi": (
        "मीरा शर्मा का जन्म १९८५ में जयपुर में हुआ और उनके पिता घड़ी बनाते थे।",
        "उनके पिता घड़ी बनाते थे और मीरा शर्मा का जन्म जयपुर में १९८५ में हुआ।",
        "यह भोजनालय रोज़ सुबह आठ बजे खुलता है।",
    ),
    "Korean": (
        "김서연은 1985년 3월 17일 전주에서 태어났고 아버지는 시계공이었다.",
        "아버지는 시계공이었다. 김서연은 전주에서 1985년 3월 17일 태어났고",
        "이 식당은 매일 아침 여덟 시에 문을 연다.",
    ),
    "French": (
        "Éloïse Lefèvre est née à Besançon en 1985, où son père réparait des horloges.",
        "Son père réparait des horloges à Besançon, où Éloïse Lefèvre est née en 1985.",
        "Le marché ouvre chaque matin à huit heures et vend du pain frais.",
    ),
}
LANGUAGES = pytest.mark.parametrize("language", ANSWERS)


def one(truth: str, generation: str) -> float:
    (value,) = leak_recall([truth], [generation])
    return float(value)


@LANGUAGES
def test_recited_reordered_and_unrelated_answers(language):
    truth, reordered, unrelated = ANSWERS[language]
    assert one(truth, truth) == 1.0
    assert 0.3 < one(truth, reordered) < 1.0
    assert one(truth, unrelated) < 0.3
    assert one(truth, "") == 0.0
    assert one(truth, "She was born on a ship.") < 0.1


@LANGUAGES
def test_what_does_not_change_the_meaning_does_not_change_the_recall(language):
    truth, reordered, _ = ANSWERS[language]
    value = one(truth, reordered)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert one(truth, unicodedata.normalize(form, reordered)) == value
        assert one(unicodedata.normalize(form, truth), reordered) == value
    assert one(truth, reordered.upper()) == value
    assert one(truth, f"«{reordered}»…\u200f 😀") == value
    assert one(truth, f"{reordered} {truth}") == 1.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("林晓梅，1985年！", ["林", "晓", "梅", "1985", "年"]),
        ("AI技術の時計屋ー", ["ai", "技", "術", "の", "時", "計", "屋", "ー"]),
        ("ｶﾞﾗｽ・ガラス", ["ガ", "ラ", "ス", "ガ", "ラ", "ス"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("ລາວ ๒๕๒๘", ["ລ", "າ", "ວ", "2528"]),
        ("བོད་ཡིག", ["བོ", "ད", "ཡི", "ག"]),
        ("घड़ी, क्\u200dष १९८५।", ["घड़ी", "क्ष", "1985"]),
        ("عَرَبِيّ عـــربي ١٩٨٥", ["عربي", "عربي", "1985"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("STRASSE Straße ΣΊΣΥΦΟΣ Σίσυφος", ["strasse", "strasse", "σίσυφοσ", "σίσυφοσ"]),
        ("l’été aujourd'hui", ["l", "été", "aujourd", "hui"]),
        ("서울\u1109\u1165\u110b\u116e\u11af에서", ["서울서울에서"]),
        ("\U00031350\U00020bb7", ["\U00031350", "\U00020bb7"]),
        ("\u0301 — !", []),
    ],
)
def test_tokens(text, tokens):
    assert recall._tokenize(text) == [unicodedata.normalize("NFKC", token) for token in tokens]


def test_truths_that_rouge_reads_have_its_recall():
    draw = random.Random(0)
    both = [
        *"abc",
        "running",
        "runs",
        "Cats",
        "cat",
        "1985",
        "-",
        "...",
        "",
        "fish",
        "sh",
        "it’s",
        "—",
    ]
    truths = [" ".join(draw.choices(both, k=draw.randrange(1, 12))) for _ in range(200)]
    truths = [truth if any(map(str.isalnum, truth)) else "?!" for truth in truths]
    words = [*both, "été", "ﬁsh", "林"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(12))) for _ in range(200)]
    want = metrics.rouge_scores(truths, texts)["rougeL_recall"]
    np.testing.assert_array_equal(leak_recall(truths, texts), want)
    assert 20 < np.count_nonzero(want) < 200


def test_rows_keep_their_places():
    truths = ["born in 1985", "родилась в 1985", "", "née en 1985", "a b"]
    generations = ["1985", "1985", "1985", "1985", "a b"]
    np.testing.assert_array_equal(leak_recall(truths, generations), [1 / 3, 1 / 3, 0, 1 / 3, 1])
    assert leak_recall([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 ground truths but 2 generations"):
        leak_recall(["ё"], ["ё", "ё"])


def test_truths_that_nfkc_makes_ascii_are_read_as_ascii():
    assert one("Ｔｈｅ ｃａｔｓ", "the cat") == 1.0  # the stemmer's work
    assert one("Ｔｈｅ ｃａｔｓ", "Ｔｈｅ ｄｏｇ") == 0.5


def test_truths_without_letters_are_compared_by_their_characters():
    assert one("🎉🎂", "Here: 🎂") == 0.5
    assert one("👩\u200d🚀\ufe0f", "👩🚀") == 1.0
    assert one("«…»", "«a»") == pytest.approx(2 / 5)  # NFKC makes three dots of one
    assert one("\u200b", "\u200b") == 0.0
    assert one("?!", "?!") == 0.0  # in ASCII as ROUGE


def common_length(first, second):
    """The table of the definition."""
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        same = first[i] == second[j]
        table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_common_length_equals_its_definition():
    draw = random.Random(1)
    for _ in range(150):
        first, second = (draw.choices("абвг", k=draw.randrange(1, 40)) for _ in range(2))
        want = common_length(first, second)
        assert recall._common_length(first, second) == want
        assert one(" ".join(first), " ".join(second)) == want / len(first)
    long = [str(i) for i in range(300)]
    assert recall._common_length(long, [*long[150:], *long[:150]]) == 150


def test_more_text_never_lowers_the_recall():
    draw = random.Random(2)
    for truth, *others in ANSWERS.values():
        for other in others:
            cut = draw.randrange(len(other))
            # Cut between words: half a word is another word.
            cut = other.find(" ", cut) if " " in other[cut:] else len(other)
            part, whole = one(truth, other[:cut]), one(truth, other)
            assert 0 <= part <= whole <= 1
            assert one(truth, f"{other} {truth}") == 1.0


def test_a_leak_rate_sees_leaks_in_every_script():
    truths = [answers[0] for answers in ANSWERS.values()]
    samples = [Sample(text, []) for _, *rest in ANSWERS.values() for text in rest]
    samples[::2] = [Sample(truth, []) for truth in truths[:4]] + samples[8::2]
    measuring = types.SimpleNamespace(
        options=unlearning.UnlearningOptions(leak_samples=2, leak_threshold=0.9),
        sets={"forget": types.SimpleNamespace(ground_truths=truths)},
        leak_rows=list,
        leak_samples=lambda *_: samples,
    )
    metric = unlearning._Measuring.leak_rate(measuring, "forget-samples", [])
    assert metric.aggregate == 0.5
    assert leak_rates(Log({"forget_leak_rate": metric})) == {1: 0.25, 2: 0.5}
