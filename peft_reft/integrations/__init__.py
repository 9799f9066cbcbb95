"""Programs that load models themselves. Nothing here is imported by `import peft_reft`."""
