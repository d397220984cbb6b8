"""Chat templates that an artifact carries, rendered by transformers: foreign code, in a sandbox that is kept up."""

from typing import Any

from hpc.errors import ArtifactError


def render_prompt(template: str, messages: list[dict[str, str]], bos: str | None, eos: str | None) -> str:
    """Messages (`{"role", "content"}`) as the text up to the answer. bos, eos: the tokens that a template may name.

    Raises ArtifactError when the template refuses the conversation.
    """
    from jinja2 import TemplateError  # slow to load, like the next, and a model without a template needs neither
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        made: Any = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, bos_token=bos or "",
            eos_token=eos or "",
        )  # fmt: skip
    except (TemplateError, TypeError) as error:
        raise ArtifactError(
            f"the artifact's chat template refuses this conversation ({error}): change its turns, or export the model "
            "again with another chat_template.jinja"
        ) from None
    return str(made[0][0])
