"""The model card of an export: where the weights come from, in the words of the run's own records."""

from typing import TYPE_CHECKING

import yaml

from megacm3.convert.configs import CLASSES

if TYPE_CHECKING:
    from megacm3.convert.to_hf import Export

_CARD = """---
library_name: transformers
pipeline_tag: {tag}
tags: [megacm3, {family}, text-to-image, image-to-text]
---

# {title}

A {family} model of images and text as one sequence of tokens, {parameters:,} parameters, exported by megacm3 for
transformers' `{hf_class}`.

- Trained for {steps} optimizer steps ({tokens} tokens) at a sequence length of {length}; {objective} objective.
- Checkpoint fingerprint: `{fingerprint}`
- Token stores: {stores}
- Tokenizers: {tokenizers}

Text ids and image codes share one vocabulary; `megacm3.json` has the table, `text_tokenizer/` and `image_tokenizer/`
turn text and pictures into ids and back. The licence of the data and any safety filtering are those of the run: this
card states nothing that the run did not record. Special names inside a text become special tokens, as is usual with
transformers; for text that you do not trust pass `split_special_tokens=True`.

## Training configuration

```yaml
{config}```
"""


def model_card(export: "Export") -> str:
    """README.md of the folder."""
    state = export.checkpoint.state
    stores = [source["store"][:16] for source in (state.get("stream") or {}).get("stores", [])]
    parameters = sum(_count(name.shape) for name in export.table)
    tree = {key: value for key, value in export.checkpoint.config.items() if key not in ("checkpoint", "log")}
    return _CARD.format(
        tag="image-text-to-text" if export.kind == "chameleon" else "text-generation",
        family=export.config.model.family,
        title=f"{export.config.model.preset or export.config.model.family}, step {export.checkpoint.step}",
        parameters=parameters,
        hf_class=CLASSES[export.kind],
        steps=export.checkpoint.step,
        tokens=state.get("tokens", "unknown"),
        length=export.config.model.sequence_length,
        objective=export.config.objective.kind,
        fingerprint=export.checkpoint.manifest.fingerprint,
        stores=", ".join(f"`{store}`" for store in stores) or "not recorded",
        tokenizers=", ".join(sorted(export.tokenizers)) or "none",
        config=yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
