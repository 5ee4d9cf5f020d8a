"""Print a table of the finished models from their records."""

from __future__ import annotations

import json

from common import DATA


def main() -> None:
    """One line a model."""
    print("| model | parameters | file, MB | steps | tokens or images seen | seconds | evaluation |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(DATA.glob("*/record.json")):
        record = json.loads(path.read_text("utf-8"))
        result = record["evaluation"]["eval"]
        shown = (
            f"accuracy {result['accuracy']:.4f}"
            if "accuracy" in result
            else f"loss {result['loss_per_token']:.3f}, perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits a byte"
        )
        steps = record.get("steps", record["arguments"].get("steps"))
        seen = record.get("tokens_seen", record.get("images_seen"))
        size = record["files"]["model.safetensors"]["bytes"] / 1e6
        print(f"| {record['name']} | {record['parameters']} | {size:.1f} | {steps} | {seen} | {record['seconds']:.0f} | {shown} |")


if __name__ == "__main__":
    main()
