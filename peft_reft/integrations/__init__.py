"""Integrations with programs that load models themselves. `import peft_reft` imports none of them."""
