"""The `exec` contract in a few lines: read the input, write one event a line, exit."""

import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Stream the prompt back word by word; `fail` (text) exits with 1, `exit` (number) with that code."""
    metadata = json.loads(Path(os.environ["TASK_INPUT"]).read_text())["metadata"]
    prompt = str(metadata.get("prompt", ""))
    print("this line is no event, so it becomes a log line", flush=True)
    for word in prompt.split(" "):
        print(json.dumps({"event": "text_delta", "delta": word + " "}), flush=True)
    print(json.dumps({"event": "text", "text": prompt}), flush=True)
    if "fail" in metadata:
        print(metadata["fail"], file=sys.stderr)
        return 1
    return int(metadata.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
