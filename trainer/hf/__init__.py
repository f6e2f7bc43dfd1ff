"""Models in Hugging Face's form: config.json and safetensors, read and written without any of their code."""
