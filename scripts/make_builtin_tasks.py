#!/usr/bin/env python3
"""Write capcli/builtin/tasks/{banking77,mr,subj,wnut17}/{train,validation}.parquet from parquet files.

usage: make_builtin_tasks.py --source FOLDER [-o capcli/builtin/tasks] [--seed 77]

FOLDER holds banking77/{train,test}.parquet, mr/train.parquet and subj/train.parquet with the columns text (string)
and label (ClassLabel), and wnut17/{train,validation}.parquet with tokens (strings) and ner_tags (ClassLabels).
banking77 keeps its own division: its whole test set becomes `validation`. wnut17 keeps train and validation; its test
set is not shipped. mr and subj have none: they are shuffled and split here, 90 % to 10 % in every class. A training
text that stands in validation or earlier in training (case and white space apart) is left out. The same input and seed
give the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

VALIDATION_SHARE = 0.1
UNSPLIT = ("mr", "subj")
COLUMNS = {"wnut17": ("tokens", "ner_tags")}


def normalised(text: str) -> str:
    """The form in which two texts count as the same: lower case, single spaces."""
    return " ".join(text.lower().split())


def read_table(path: Path) -> pa.Table:
    """Text and labels of a source file, with the `huggingface` metadata that names the labels."""
    table = pq.read_table(path, columns=list(COLUMNS.get(path.parent.name, ("text", "label"))))
    if b"huggingface" not in (table.schema.metadata or {}):
        raise SystemExit(f"{path}: no label names in the file (key 'huggingface' of the schema)")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    kept = {name: feature for name, feature in features.items() if name in table.column_names}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kept}})})


def keys(table: pa.Table) -> list[str]:
    """The normalised text of each row; words are joined."""
    return [normalised(text if isinstance(text, str) else " ".join(text)) for text in table[0].to_pylist()]


def without_seen(table: pa.Table, seen: set[str]) -> pa.Table:
    """The rows whose normalised text is not in `seen`, which grows by the texts that are kept."""
    rows = []
    for row, key in enumerate(keys(table)):
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return table.take(rows)


def stratified_split(labels: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers of train and validation, each shuffled; round(share · n) rows of every class are validation."""
    generator = random.Random(seed)
    order = list(range(len(labels)))
    generator.shuffle(order)
    validation: set[int] = set()
    for label in sorted(set(labels)):
        members = [row for row in order if labels[row] == label]
        validation.update(members[: round(share * len(members))])
    train = [row for row in order if row not in validation]
    return train, [row for row in order if row in validation]


def split_task(source: Path, name: str, seed: int) -> dict[str, pa.Table]:
    """The two splits of a task; no training text occurs twice or in validation."""
    if name in UNSPLIT:
        table = without_seen(read_table(source / name / "train.parquet"), set())
        train, validation = stratified_split(table["label"].to_pylist(), VALIDATION_SHARE, seed)
        return {"train": table.take(train), "validation": table.take(validation)}
    held = read_table(source / name / ("test.parquet" if name == "banking77" else "validation.parquet"))
    train = without_seen(read_table(source / name / "train.parquet"), set(keys(held)))
    return {"train": train, "validation": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("capcli/builtin/tasks"))
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args()
    for name in ("banking77", *UNSPLIT, "wnut17"):
        (args.output / name).mkdir(parents=True, exist_ok=True)
        for split, table in split_task(args.source, name, args.seed).items():
            path = args.output / name / f"{split}.parquet"
            pq.write_table(table, path, compression="zstd", compression_level=19)
            print(f"{path}: {table.num_rows} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
