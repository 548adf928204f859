"""A row of each data set of docs/datasets.md, written by hand in the shape in which the set is published."""

from __future__ import annotations

import json
from typing import Any

THOUGHT = "<think>\nadd\n</think>\n\n4"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
FUNCTION = {"name": "get_weather", "description": "Weather", "parameters": {"city": {"type": "str"}}}
TOOL = {"type": "function", "function": FUNCTION}


def messages(*contents: str, **beside: Any) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": text, **beside} for i, text in enumerate(contents)
    ]


def sharegpt(*pairs: tuple[str, str], **beside: Any) -> list[dict[str, Any]]:
    return [{"from": who, "value": text, **beside} for who, text in pairs]


def calls(**envelope: Any) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": "Paris"})}
    return [{"id": "1", "type": "function", "function": function, **envelope}]


HELLO = [("human", "Hi"), ("gpt", "Hello!")]
MARKED = (
    "<|begin_of_thought|>\n\nadd\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>"
)
INFO = {
    "source": "s",
    "reference_answer": "4",
    "test_case": None,
    "think_content": "add",
    "answer_content": "4",
}
HERMES = "You are a function calling AI model. <tools>\n" + json.dumps([TOOL]) + "\n</tools>"
GLAIVE = (
    'USER: Weather in Paris?\n\n\nASSISTANT: <functioncall> {"name": "get_weather", "arguments": \'{"city": '
    '"Paris"}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"t": 22}\n\n\nASSISTANT: It is 22 C. <|endoftext|>\n\n\n'
)
AGENT = [
    {"role": "system", "content": [{"type": "text", "text": "You can act."}], "agent": "main"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Paris?"}],
    },
    {"role": "assistant", "content": "I look.", "thought": "I look.", "action": "ls", "tool_calls": calls()},
    {"role": "tool", "content": [{"type": "text", "text": "22"}], "tool_call_ids": ["1"]},
    {"role": "assistant", "content": "It is 22 C.", "thought": "", "action": ""},
]

# Data set: (row, what is trained of it turn by turn, without the token that ends a turn, texts of its context).
ROWS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "anon8231489123/ShareGPT_Vicuna_unfiltered": (
        {"id": "a_0", "conversations": sharegpt(*HELLO)}, ["Hello!"], ["Hi"]
    ),
    "teknium/OpenHermes-2.5": (
        {"custom_instruction": None, "topic": None, "model_name": None, "model": None, "skip_prompt_formatting": False,
         "category": "orca", "conversations": sharegpt(("system", "Be brief."), *HELLO, weight=None), "views": None,
         "language": None, "id": None, "title": None, "idx": None, "hash": None, "avatarUrl": None,
         "system_prompt": "Be brief.", "source": "airoboros2.2"},
        ["Hello!"], ["system\nBe brief."],
    ),
    "allenai/tulu-3-sft-mixture": ({"id": "t", "messages": messages("Hi", "Hello!"), "source": "s"}, ["Hello!"], []),
    "HuggingFaceTB/smoltalk": ({"messages": messages("Hi", "Hello!"), "source": "s"}, ["Hello!"], []),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "Hi", "prompt_id": "p", "messages": messages("Hi", "Hello!", "Bye", "Bye!")}, ["Hello!", "Bye!"], []
    ),
    "HuggingFaceH4/no_robots": (
        {"prompt": "Hi", "prompt_id": "p", "messages": messages("Hi", "Hello!"), "category": "Chat"}, ["Hello!"], []
    ),
    "Open-Orca/SlimOrca": (
        {"conversations": [
            {"from": "system", "value": "Be brief.", "weight": None},
            {"from": "human", "value": "Hi", "weight": 0.0}, {"from": "gpt", "value": "Hello!", "weight": 1.0}]},
        ["Hello!"], ["system\nBe brief."],
    ),
    "Open-Orca/OpenOrca": (
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello!"},
        ["Hello!"], ["system\nBe brief."],
    ),
    "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered": (
        {"uuid": "u", "model": "Llama-3.1-70B-Instruct", "gen_input_configs": {"temperature": 1.0, "seed": None},
         "conversations": sharegpt(*HELLO, ("human", "Bye"), ("gpt", "Bye!")), "instruction": "Hi",
         "response": "Hello!", "instruction_2": "Bye", "response_2": "Bye!", "instruct_reward": 1.5},
        ["Hello!", "Bye!"], [],
    ),
    "allenai/WildChat-1M": (
        {"conversation_hash": "h", "model": "gpt-4", "conversation": messages(
            "Hi", "Hello!", toxic=False, language="English", temperature=1.0, header=None)},
        ["Hello!"], [],
    ),
    "lmsys/lmsys-chat-1m": (
        {"conversation_id": "c", "model": "vicuna-13b", "conversation": messages("Hi", "Hello!"), "turn": 1,
         "openai_moderation": [], "redacted": False},
        ["Hello!"], [],
    ),
    "GAIR/lima": ({"conversations": ["Hi", "Hello!", "Bye", "Bye!"], "source": "s"}, ["Hello!", "Bye!"], []),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Who wrote it?", "context": "By Ann.", "response": "Ann.", "category": "closed_qa"},
        ["Ann."], ["user\nWho wrote it?\n\nBy Ann.<|im_end|>"],
    ),
    "tatsu-lab/alpaca": (
        {"instruction": "Translate.", "input": "Hallo", "output": "Hello", "text": "Below is an instruction ..."},
        ["Hello"], ["user\nTranslate.\nHallo<|im_end|>"],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "Hi", "prompt_id": "p", "chosen": messages("Hi", "Hello!"), "rejected": messages("Hi", "no"),
         "messages": messages("Hi", "Hello!"), "score_chosen": 8.0, "score_rejected": 3.0},
        ["Hello!"], [],
    ),
    "Anthropic/hh-rlhf": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: Bye!", "rejected": "\n\nHuman: Hi"},
        ["Hello!", "Bye!"], ["user\nHi<|im_end|>"],
    ),
    "open-r1/OpenR1-Math-220k": (
        {"problem": "2+2?", "solution": "add", "answer": "4", "uuid": "u", "is_reasoning_complete": [True, True],
         "generations": [THOUGHT, "5"], "correctness_math_verify": [True, False], "correctness_llama": None,
         "finish_reasons": None, "messages": messages("2+2?", THOUGHT)},
        [THOUGHT], [],
    ),
    "open-r1/Mixture-of-Thoughts": (
        {"messages": messages("2+2?", THOUGHT), "num_tokens": 9, "source": "s"}, [THOUGHT], []
    ),
    "open-thoughts/OpenThoughts3-1.2M": (
        {"difficulty": None, "source": "s", "domain": "math",
         "conversations": sharegpt(("human", "2+2?"), ("gpt", THOUGHT))},
        [THOUGHT], [],
    ),
    "open-thoughts/OpenThoughts-114k": (
        {"system": "Structure your response in marks.",
         "conversations": sharegpt(("user", "2+2?"), ("assistant", MARKED))},
        [THOUGHT], [],
    ),
    "a-m-team/AM-DeepSeek-R1-Distilled-1.4M": (
        {"messages": [
            {"role": "user", "content": "2+2?", "info": INFO | {"think_content": None, "answer_content": None}},
            {"role": "assistant", "content": "<think>\nadd\n</think>\n\n<answer>4</answer>", "info": INFO}]},
        ["<think>\nadd\n</think>\n\n<answer>4</answer>"], [],
    ),
    "nvidia/Nemotron-Post-Training-Dataset-v2": (
        {"uuid": "u", "license": "cc", "generator": "DeepSeek-R1-0528", "version": "v1", "category": "math",
         "reasoning": "on", "metadata": "{}", "messages": [
            {"role": "system", "content": ""}, *messages("2+2?", THOUGHT)]},
        [THOUGHT], [],
    ),
    "nvidia/Nemotron-Post-Training-Dataset-v1": (
        {"uuid": "u", "license": "cc", "generator": "Qwen3-235B-A22B", "version": "v1", "category": "tool",
         "reasoning": "off", "metadata": json.dumps({"tools": [TOOL]}), "messages": [
            {"role": "user", "content": "Weather in Paris?", "tool_calls": []},
            {"role": "assistant", "content": "", "tool_calls": calls()},
            {"role": "tool", "content": "22", "tool_calls": []},
            {"role": "assistant", "content": "It is 22 C.", "tool_calls": []}]},
        [CALL, "It is 22 C."], ['"name": "get_weather"'],
    ),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": (
        {"version": "v1.1", "input": messages("2+2?"), "output": THOUGHT, "category": "math", "license": "cc",
         "reasoning": "on", "generator": "DeepSeek-R1", "used_in_training": "Ultra",
         "system_prompt": "detailed thinking on"},
        [THOUGHT], ["system\ndetailed thinking on"],
    ),
    "nvidia/AceReason-1.1-SFT": (
        {"category": "math", "source": "s", "input": "2+2?", "output": THOUGHT}, [THOUGHT], ["user\n2+2?"]
    ),
    "nvidia/OpenMathReasoning": (
        {"problem": "2+2?", "generated_solution": THOUGHT, "expected_answer": "4", "generation_model": "DeepSeek-R1",
         "inference_mode": "cot", "problem_source": "aops"},
        [THOUGHT], ["user\n2+2?"],
    ),
    "AI-MO/NuminaMath-CoT": (
        {"source": "olympiads", "problem": "2+2?", "solution": "It is 4.", "messages": messages("2+2?", "It is 4.")},
        ["It is 4."], [],
    ),
    "simplescaling/s1K-1.1": (
        {"question": "2+2?", "solution": "4", "cot": None, "deepseek_thinking_trajectory": "add",
         "deepseek_attempt": "4", "gemini_thinking_trajectory": "plus", "gemini_attempt": "four"},
        [THOUGHT], ["user\n2+2?"],
    ),
    "GAIR/LIMO": ({"question": "2+2?", "solution": "Add: 4.", "answer": "4"}, ["Add: 4."], ["user\n2+2?"]),
    "MegaScience/MegaScience": (
        {"question": "2+2?", "answer": "Add: 4.", "subject": "math", "reference_answer": "4", "source": "s"},
        ["Add: 4."], ["user\n2+2?"],
    ),
    "Salesforce/xlam-function-calling-60k": (
        {"id": 0, "query": "Weather in Paris?", "tools": json.dumps([FUNCTION]),
         "answers": json.dumps([{"name": "get_weather", "arguments": {"city": "Paris"}}])},
        [CALL], ['"description": "Weather"', "user\nWeather in Paris?"],
    ),
    "glaiveai/glaive-function-calling-v2": (
        {"system": "SYSTEM: You have functions. -\n" + json.dumps(FUNCTION) + "\n\n", "chat": GLAIVE},
        ["<functioncall> {\"name\": \"get_weather\", \"arguments\": '{\"city\": \"Paris\"}'}", "It is 22 C."],
        ["system\nYou have functions.", '<tool_response>\n{"t": 22}\n</tool_response>'],
    ),
    "NousResearch/hermes-function-calling-v1": (
        {"id": "h", "tools": json.dumps([TOOL]), "category": "c", "task": "t", "conversations": sharegpt(
            ("system", HERMES), ("human", "Weather in Paris?"), ("gpt", CALL + "\n"),
            ("tool", "<tool_response>\n22\n</tool_response>\n<tool_response>\n23\n</tool_response>\n"),
            ("gpt", "It is 22 C."))},
        [CALL, "It is 22 C."],
        ["user\n<tool_response>\n22\n</tool_response>\n<tool_response>\n23\n</tool_response><|im_end|>"],
    ),
    "Team-ACE/ToolACE": (
        {"system": "You compose functions. " + json.dumps([FUNCTION]), "conversations": sharegpt(
            ("user", "Weather in Paris?"), ("assistant", '[get_weather(city="Paris")]'),
            ("tool", '[{"name": "get_weather", "results": {}}]'), ("assistant", "It is 22 C."))},
        ['[get_weather(city="Paris")]', "It is 22 C."], ["system\nYou compose functions."],
    ),
    "SWE-bench/SWE-smith-trajectories": (
        {"messages": json.dumps(AGENT), "instance_id": "i", "resolved": True, "model": "claude-3-7-sonnet",
         "traj_id": "t", "patch": "p"},
        ["I look.\n" + CALL, "It is 22 C."], ["system\nYou can act.", "Weather in Paris?"],
    ),
    "nebius/SWE-agent-trajectories": (
        {"instance_id": "i", "model_name": "swe-agent-llama-70b", "target": True, "exit_status": "submitted",
         "generated_patch": "p", "eval_logs": "l", "trajectory": [
            {"cutoff_date": None, "mask": False, "role": "system", "system_prompt": "You can act.", "text": None},
            {"cutoff_date": "2023", "mask": False, "role": "user", "system_prompt": None, "text": "Fix it."},
            {"cutoff_date": "2023", "mask": False, "role": "ai", "system_prompt": None, "text": "ls"}]},
        ["ls"], ["system\nYou can act.", "user\nFix it."],
    ),
    "nebius/SWE-rebench-openhands-trajectories": (
        {"trajectory_id": "t", "instance_id": "i", "repo": "r", "model_patch": "p", "exit_status": "submit",
         "resolved": 1, "tools": [TOOL], "trajectory": [
            {"role": "system", "content": "You can act.", "tool_calls": None, "name": None, "tool_call_id": None},
            {"role": "user", "content": "Fix it.", "tool_calls": None, "name": None, "tool_call_id": None},
            {"role": "assistant", "content": "I look.", "tool_calls": calls(), "name": None, "tool_call_id": None},
            {"role": "tool", "content": "22", "tool_calls": None, "name": "get_weather", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is 22 C.", "tool_calls": None, "name": None, "tool_call_id": None}]},
        ["I look.\n" + CALL, "It is 22 C."], ['"description": "Weather"', "user\nFix it."],
    ),
}  # fmt: skip
