"""What vLLM's modules of vision-language models import of torchvision, of which no build fits a CPU build of torch. Text needs
none of it: whatever would touch a pixel raises."""

__version__ = "0.28.0"
