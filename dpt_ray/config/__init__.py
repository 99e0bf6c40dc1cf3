"""What a run is: one YAML file, checked as a whole before anything starts."""

from dpt_ray.config.run import Config as Config
from dpt_ray.config.run import load_config as load_config
from dpt_ray.config.yaml_file import ConfigError as ConfigError
from dpt_ray.config.yaml_file import to_yaml as to_yaml
