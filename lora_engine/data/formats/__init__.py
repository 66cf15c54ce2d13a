"""The shapes that records come in: recognised by their fields, read as one of a few kinds.

`recognise.recognise` is the entry; each other module has the formats of one family. A format reads
a row into `Fields`, a row of one of the kinds that `records.parse_record` takes:

- `messages`, with `tools`, `documents` and `chat_template_kwargs` where the row has them
- `prompt` and `completion`
- `text`
- `prompt`, `chosen` and `rejected`
- `prompt`, `completion` and `label`
- `prompt`
- `input_ids` and `supervised`
"""
