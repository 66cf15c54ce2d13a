"""Chat templates in the manner of well-known models: their shapes, not their full texts."""

CHATML_DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}"
    "{% endfor %}"
)

# Writes an empty thinking block into the last turn only, and cuts thinking out of earlier ones.
QWEN3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{% endif %}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Ends the whole conversation, not each turn, with the end-of-sequence token.
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# The generation prompt begins a thought that is not kept in the conversation.
THINKS_ALOUD = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# No end-of-turn token at all.
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)

# Renders tool calls after the text, as ChatML models do.
CHATML_TOOLS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message.get('tool_calls', []) %}"
    "{{ '\n<tool_call>' + call['name'] + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Says how long the conversation is before it begins and looks at the text: no exact mask.
NO_EXACT_MASK = (
    "{{ messages | length }} messages\n{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] | capitalize + '\n' }}{% endfor %}"
)

SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

# Each turn ends in the end-of-sequence token and a line.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# A system prompt goes into the first question; calls are a list of JSON; roles have an order.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if m == asked[-1] and tools %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if loop.first and system %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['tool_calls'] %}[TOOL_CALLS] [{% for c in m['tool_calls'] %}"
    "{% if c['id'] | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{{ \'{"name": "\' + c["function"]["name"] + \'", "arguments": \' }}'
    '{{ c["function"]["arguments"] | tojson }}, "id": "{{ c["id"] }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS] {{ m['content'] }}[/TOOL_RESULTS]"
    "{% else %}{{ raise_exception('only system, user, tool and assistant roles') }}{% endif %}"
    "{% endfor %}"
)

# The prompt opens a thought, or closes it at once; an answer without one has the closing tag alone.
CLOSES_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% if m['reasoning_content'] and loop.last %}<think>{{ m['reasoning_content'] }}{% endif %}"
    "</think>{{ m['content'] }}<|end|>{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '<think>' if thinking else '</think>' }}{% endif %}"
)

# Says the date and a mode in a system turn, and where the assistant writes, in blocks.
SMOLLM3 = (
    "{% set thinks = enable_thinking is undefined or enable_thinking %}"
    "{% set mode = '/think' if thinks else '/no_think' %}"
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\nMode: ' + mode + '\n' }}"
    "{% if tools %}{% for t in tools %}{{ t | string + '\n' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{% if not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m['content'].lstrip('\n') + '<|im_end|>\n' }}"
    "{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)

# Takes contents as lists of parts only.
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
