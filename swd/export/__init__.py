"""A student as one folder that diffusers, peft and ComfyUI load, and its verification."""
