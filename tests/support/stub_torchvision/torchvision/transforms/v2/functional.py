"""See the package."""

from torchvision.transforms.functional import __getattr__ as __getattr__
