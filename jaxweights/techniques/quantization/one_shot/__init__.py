"""One-shot quantization: each weight on its own, with or without statistics of its inputs."""
