"""What a validator of a section raises, for `runs.runfile.errors` to put into one line."""

from pydantic_core import PydanticCustomError

from fedjax_llm.runs.sections import toml_errors


def problem(
    path: toml_errors.Path, text: str, refused: bool = False, got: bool = True
) -> PydanticCustomError:
    """What a validator of a section raises.

    Args:
      path: the key, from that section; () is the section itself.
      text: what is wrong, without the key and its value where `path` names one.
      refused: whether it breaks privacy or security rather than a rule of the file.
      got: whether the value is told after the text.
    """
    # The context travels with the error to `errors.explained`; braces in the text must not be
    # formatted.
    context = {"path": path, "text": text, "refused": refused, "got": got}
    return PydanticCustomError("run_file", "{text}", context)
