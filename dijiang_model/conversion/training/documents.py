"""Files of text as people have them: plain text, or JSON objects or rows of Parquet with a text or a conversation each.

An object has `text`, or `messages` (`role` and `content`), or `conversations` (`from` and `value`), as the common data
sets of the hub do. Conversations become text in the form of the model's own chat template.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dijiang_model.conversion.training.chat_prompt import Message, RenderChat, plain_chat
from dijiang_model.errors import ConversionError
from dijiang_model.formats.stub_files import stub_problem

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".jsonl", ".parquet")
OTHER_FORMATS = {
    ".arrow": "Arrow; make JSON lines of it: datasets.Dataset.from_file(FILE).to_json(FILE.jsonl)",
    ".csv": "CSV; make JSON lines of it: pandas.read_csv(FILE).to_json(FILE.jsonl, orient='records', lines=True)",
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".zip"), "compressed; unpack it first"),
    **dict.fromkeys((".pdf", ".docx", ".epub"), "a document; extract its text first"),
    **dict.fromkeys((".safetensors", ".bin", ".pt", ".gguf"), "a file of tensors"),
}
"""Files whose bytes are not the text that somebody would train on."""
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "system": "system"}
"""Of `conversations`, as ShareGPT names them."""
_JSON = (".jsonl", ".json")
_PARQUET = ".parquet"


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the text files under folders, in order of their names.

    Raises:
        ConversionError: a path does not exist, a file is of another format, or a folder holds no text file.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
            if not inside:
                for file in sorted(path.rglob("*")):
                    _refuse_other_format(file)
                raise ConversionError(f"{path} holds no text files ({', '.join(TEXT_SUFFIXES)})")
            found += inside
        elif path.is_file():
            _refuse_other_format(path)
            found.append(path)
        else:
            raise ConversionError(f"{path} does not exist")
    return list(dict.fromkeys(found))


def read_text(file: Path, *, render: RenderChat = plain_chat) -> str:
    """The text of a UTF-8 file; documents of JSON and Parquet follow each other with an empty line between.

    Args:
        render: makes text of conversations.

    Raises:
        ConversionError: it cannot be read, is encoded otherwise, or an object has neither text nor conversation.
    """
    if file.suffix.lower() == _PARQUET:
        return "\n\n".join(_document(where, value, render) for where, value in _rows(file))
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file} is not UTF-8: byte {error.start:,} cannot be read; convert it first") from error
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    if file.suffix.lower() not in _JSON:
        return text
    return "\n\n".join(_document(where, value, render) for where, value in _objects(file, text))


def _refuse_other_format(file: Path) -> None:
    form = OTHER_FORMATS.get(file.suffix.lower())
    problem = None
    if form is not None:
        problem = f"{file} is {form.replace('FILE', file.name)}"
    elif file.is_file():
        problem = stub_problem(file)
    if problem is not None:
        raise ConversionError(problem)


def _objects(file: Path, text: str) -> Iterator[tuple[str, object]]:
    """Where each value stands, in words, and the value."""
    try:
        if file.suffix.lower() == ".json":
            values = json.loads(text)
            listed = values if isinstance(values, list) else [values]
            yield from ((f"{file}, entry {number:,}", value) for number, value in enumerate(listed, start=1))
            return
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{file} is not valid JSON: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file}, line {number:,}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConversionError(f"{file}, line {number:,}, is not valid JSON: {error}") from error


def _rows(file: Path) -> Iterator[tuple[str, object]]:
    """Where each row of a Parquet file stands, in words, and the row as an object."""
    try:
        from pyarrow import ArrowException, parquet  # an extra
    except ImportError as error:
        raise ConversionError(f"{file} is Parquet, which needs pyarrow: pip install 'dijiang[parquet]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number:,}", row
    except (ArrowException, OSError) as error:
        raise ConversionError(f"{file} cannot be read as Parquet: {error}") from error


def _document(where: str, value: object, render: RenderChat) -> str:
    members: Mapping[str, object] = value if isinstance(value, dict) else {}
    if isinstance(members.get("text"), str):
        return str(members["text"])
    listed = members.get("messages", members.get("conversations"))
    if not isinstance(listed, list) or not listed:
        raise ConversionError(f"{where}: neither a text, nor messages, nor conversations")
    try:
        return render([_message(where, item) for item in listed])
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from error


def _message(where: str, value: object) -> Message:
    members: Mapping[str, object] = value if isinstance(value, dict) else {}
    is_sharegpt = "from" in members
    role: object = _ROLES.get(str(members["from"])) if is_sharegpt else members.get("role")
    content: object = members.get("value" if is_sharegpt else "content")
    if isinstance(content, list):  # parts, as the OpenAI API has them
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConversionError(f"a message has no role, or no content that is text: {json.dumps(value)[:100]}")
    return {"role": role, "content": content}
