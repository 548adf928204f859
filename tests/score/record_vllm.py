"""Asks a vLLM server every request of recorded_rows/vllm_server.jsonl again and writes its answers there.

vllm serve build/test-models/smollm2 --served-model-name smol --dtype float32 --enforce-eager --enable-scale-out
python -m tests.score.record_vllm http://localhost:8000
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "recorded_rows" / "vllm_server.jsonl"


def answer(server: str, endpoint: str, request: dict[str, Any]) -> Any:
    """The answer as it comes, of a stream the list of its chunks."""
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(server + endpoint, json.dumps(request).encode(), headers)
    with urllib.request.urlopen(asked) as response:
        text = response.read().decode()
    if not request.get("stream"):
        return json.loads(text)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(event) for event in events if event != "[DONE]"]


def main(server: str) -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["response"] = answer(server, row["metadata"]["endpoint"], row["request"])
        print(row["id"])
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    ROWS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
