"""
Errors of requests, each with its one HTTP status.

* ServiceError
  - InvalidJson         400   the body is not JSON, or not UTF-8
  - InvalidRequest      400   the message is not HTTP as this service accepts it
  - Unauthorized        401   the request has no key, or an unknown one
  - Forbidden           403   the request's origin or host is not allowed
  - UnknownModel        404   no loaded model has that name
  - BodyTooSlow         408   the body was not complete in time
  - LoadInProgress      409   a model of that name is being loaded
  - TooLarge            413   the body, the list or a text exceeds its limit
  - TargetTooLong       414   the request's path and query exceed their limit
  - UnsupportedEncoding 415   the body has an unsupported content coding
  - InvalidInput        422   the body is JSON with unusable content
  - Overloaded          429   the queue is full; Retry-After estimates when it has room
  - HeadersTooLarge     431   the head or the trailers exceed their limit
  - ModelOutputInvalid  500   the model's output is not usable: NaN, or a wrong shape
  - ModelFailed         500   the model raised an exception
  - EngineBroken        500   the engine cannot run any more; the process ends
  - NotReady            503   models are still loading
  - ShuttingDown        503   this replica is draining
  - DeadlineExceeded    504   the answer would come too late

Messages name the field and the limit. They never repeat the text.
"""

from __future__ import annotations

from http import HTTPStatus

KEY_REQUIRED = "This service asks for a key: Authorization: Bearer KEY, or X-API-Key: KEY."


class ServiceError(Exception):
    """An error that a request is answered with.

    `message` states the problem and the remedy. `param` names the request's field, where one is
    wrong. `retry_after_s` is the value of the Retry-After header.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    """The status of the answer."""
    type = "server_error"
    """The error's kind, in OpenAI's terms."""
    code = "internal_error"
    """The error's stable identifier, for callers to compare."""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        """Return the answer's body as JSON values, in OpenAI's form."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidJson(ServiceError):
    """The body is not JSON, or not UTF-8."""

    status, type, code = HTTPStatus.BAD_REQUEST, "invalid_request_error", "invalid_json"


class InvalidRequest(ServiceError):
    """The message is not HTTP as this service accepts it."""

    status, type, code = HTTPStatus.BAD_REQUEST, "invalid_request_error", "invalid_request"


class Unauthorized(ServiceError):
    """The request has no key, or an unknown one."""

    status, type, code = HTTPStatus.UNAUTHORIZED, "authentication_error", "invalid_api_key"


class Forbidden(ServiceError):
    """The request's origin or host is not allowed."""

    status, type, code = HTTPStatus.FORBIDDEN, "permission_error", "forbidden"


class UnknownModel(ServiceError):
    """No loaded model has that name."""

    status, type, code = HTTPStatus.NOT_FOUND, "invalid_request_error", "model_not_found"


class BodyTooSlow(ServiceError):
    """The body was not complete in time."""

    status, type, code = HTTPStatus.REQUEST_TIMEOUT, "timeout_error", "body_too_slow"


class LoadInProgress(ServiceError):
    """A model of that name is being loaded, or other loads take all of the time limit."""

    status, type, code = HTTPStatus.CONFLICT, "conflict_error", "load_in_progress"


class TooLarge(ServiceError):
    """The body, the list or a text exceeds its limit."""

    status, type, code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error", "too_large"


class TargetTooLong(ServiceError):
    """The request's path and query exceed their limit."""

    status, type, code = HTTPStatus.REQUEST_URI_TOO_LONG, "invalid_request_error", "target_too_long"


class UnsupportedEncoding(ServiceError):
    """The body has an unsupported content coding."""

    status, type, code = (
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "invalid_request_error",
        "unsupported_encoding",
    )


class InvalidInput(ServiceError):
    """The body is JSON with unusable content."""

    status, type, code = HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request_error", "invalid_input"


class Overloaded(ServiceError):
    """The queue is full; the caller may retry."""

    status, type, code = HTTPStatus.TOO_MANY_REQUESTS, "overloaded_error", "queue_full"


class HeadersTooLarge(ServiceError):
    """The head or the trailers exceed their limit."""

    status, type, code = (
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "invalid_request_error",
        "headers_too_large",
    )


class ModelOutputInvalid(ServiceError):
    """The model's output is not usable: NaN, or a wrong shape."""

    code = "model_output_invalid"


class ModelFailed(ServiceError):
    """The model raised an exception."""

    code = "model_failed"


class EngineBroken(ServiceError):
    """The engine cannot run any more; the process ends."""

    code = "engine_broken"


class NotReady(ServiceError):
    """Models are still loading."""

    status, type, code = HTTPStatus.SERVICE_UNAVAILABLE, "unavailable_error", "not_ready"


class ShuttingDown(ServiceError):
    """This replica is draining."""

    status, type, code = HTTPStatus.SERVICE_UNAVAILABLE, "unavailable_error", "shutting_down"

    def __init__(self, message: str) -> None:
        # Another replica can answer at once, over another connection.
        super().__init__(message, retry_after_s=1)


class DeadlineExceeded(ServiceError):
    """The answer would come too late."""

    status, type, code = HTTPStatus.GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded"
