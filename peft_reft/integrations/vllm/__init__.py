"""Serve ReFT adapters from vLLM: a plug-in of the unmodified engine.

vLLM finds it by its entry point, so that nothing need be imported:

    from vllm import LLM, SamplingParams

    llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct", additional_config={"reft_adapters": {"emoji": "emoji-adapter"}})
    llm.generate(prompts, SamplingParams(max_tokens=50, extra_args={"reft": "emoji"}))
"""
