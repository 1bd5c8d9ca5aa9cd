"""The errors a user can cause and mend. One type per layer; the command line prints them without a traceback."""


class GoalRayError(Exception):
    """Base of every error whose message names the cause and the remedy."""


class ConfigError(GoalRayError):
    """A setting is unknown, of the wrong type, or impossible together with another."""


class ShardError(GoalRayError):
    """A tar, or a sample inside one, breaks the shard contract; `key` names the sample where one is known."""

    def __init__(self, message: str, key: str = ""):
        super().__init__(message)
        self.key = key

    def __reduce__(self):  # the key survives the way between processes
        return type(self), (str(self), self.key)


class ImageError(GoalRayError):
    """Bytes that should be a picture are not, or are too large to decode safely."""


class CaptionError(GoalRayError):
    """A caption is missing, empty or not UTF-8."""


class ModelError(GoalRayError):
    """A model is unknown, of an unsupported shape, or its weights do not fit."""


class StageError(GoalRayError):
    """A stage cannot start or go on: wrong folder, too many bad samples, nothing to do."""
