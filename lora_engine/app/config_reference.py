"""docs/configuration.md, made from the configuration models.

python -m lora_engine.app.config_reference > docs/configuration.md
"""

from lora_engine.app.config import RunConfig
from lora_engine.config_schema import markdown_reference

_INTRODUCTION = """\
# Configuration

A run is one YAML file. `lora-engine train CONFIG.yaml` runs it, `lora-engine data CONFIG.yaml`
shows its data first. A config that comes with the package is named by its stem: `demo` is
[app/configs/demo.yaml](../lora_engine/app/configs/demo.yaml), a good start for your own.

Any key can be set on the command line too, by its dotted name; the value is read as YAML:

```
lora-engine train run.yaml train.max_steps=200 lora.r=8 'lora.target_modules=[q_proj, v_proj]'
lora-engine train run.yaml lora=null        # train all weights
```

The least a file must say is the model and the data:

```yaml
model:
  path: HuggingFaceTB/SmolLM2-135M-Instruct
data:
  train: my_chats.jsonl
```

An unknown key or a value of the wrong kind stops the run before any work, with one line that
names the file, the line, the key and what is expected. Paths are relative to the folder the
command is run in, and `~` is the home folder. The exit status is 0 for a run that ended, 2 for a
mistake in what was given, 1 where the machine refused (no memory, a full disk) or the engine has a
bug, and 130 after an interruption; every line says how to mend it or to go on.

`train.output_dir/config.yaml` keeps the whole configuration of a run.

This page is generated from the models in `lora_engine/app/config.py` and
`lora_engine/training/config.py`.

## Top level

"""


def reference_page() -> str:
    """The Markdown of docs/configuration.md."""
    return _INTRODUCTION + markdown_reference(RunConfig)


if __name__ == "__main__":
    print(reference_page(), end="")
