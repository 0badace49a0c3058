"""
What can go wrong with a request, and the one status each case has.

* ServiceError
  - InvalidJson         400   the body is not JSON, or not UTF-8
  - InvalidRequest      400   the message is not HTTP as this service takes it
  - Unauthorized        401   no key, or none that is known
  - Forbidden           403   the request comes from where it may not
  - UnknownModel        404   no loaded model has that name
  - BodyTooSlow         408   the body was not all there in time
  - LoadInProgress      409   a model of that name is being loaded
  - TooLarge            413   the body, the list or a text is over its limit
  - TargetTooLong       414   the request's path and query are over their limit
  - UnsupportedEncoding 415   the body is compressed in a way that is not read here
  - InvalidInput        422   the request is JSON, its content is not usable
  - Overloaded          429   the queue is full; Retry-After says when it will not be
  - HeadersTooLarge     431   the head or the trailers are over their limit
  - ModelOutputInvalid  500   the model answered something that is no answer
  - ModelFailed         500   the model raised
  - EngineBroken        500   the engine can no longer do what it did; the process ends
  - NotReady            503   models are still loading
  - ShuttingDown        503   this replica is draining
  - DeadlineExceeded    504   the answer would have come too late

Messages name the field and the limit and never repeat the text.
"""

from __future__ import annotations

from http import HTTPStatus

WANTS_A_KEY = "This service asks for a key: Authorization: Bearer KEY, or X-API-Key: KEY."


class ServiceError(Exception):
    """A request that gets an error answer."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    type = "server_error"
    code = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
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
    """The message is not HTTP as this service takes it."""

    status, type, code = HTTPStatus.BAD_REQUEST, "invalid_request_error", "invalid_request"


class Unauthorized(ServiceError):
    """No key, or none that is known."""

    status, type, code = HTTPStatus.UNAUTHORIZED, "authentication_error", "invalid_api_key"


class Forbidden(ServiceError):
    """The request comes from where it may not."""

    status, type, code = HTTPStatus.FORBIDDEN, "permission_error", "forbidden"


class UnknownModel(ServiceError):
    """No loaded model has that name."""

    status, type, code = HTTPStatus.NOT_FOUND, "invalid_request_error", "model_not_found"


class BodyTooSlow(ServiceError):
    """The body was not all there in time."""

    status, type, code = HTTPStatus.REQUEST_TIMEOUT, "timeout_error", "body_too_slow"


class LoadInProgress(ServiceError):
    """A model of that name is being loaded, or others are for all the time that there is."""

    status, type, code = HTTPStatus.CONFLICT, "conflict_error", "load_in_progress"


class TooLarge(ServiceError):
    """The body, the list or a text is over its limit."""

    status, type, code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error", "too_large"


class TargetTooLong(ServiceError):
    """The request's path and query are over their limit."""

    status, type, code = HTTPStatus.REQUEST_URI_TOO_LONG, "invalid_request_error", "target_too_long"


class UnsupportedEncoding(ServiceError):
    """The body is compressed in a way that is not read here."""

    status, type, code = (
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "invalid_request_error",
        "unsupported_encoding",
    )


class InvalidInput(ServiceError):
    """The request is JSON, its content is not usable."""

    status, type, code = HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request_error", "invalid_input"


class Overloaded(ServiceError):
    """The queue is full; the caller may retry."""

    status, type, code = HTTPStatus.TOO_MANY_REQUESTS, "overloaded_error", "queue_full"


class HeadersTooLarge(ServiceError):
    """The head or the trailers are over their limit."""

    status, type, code = (
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "invalid_request_error",
        "headers_too_large",
    )


class ModelOutputInvalid(ServiceError):
    """The model answered something that is no answer."""

    code = "model_output_invalid"


class ModelFailed(ServiceError):
    """The model raised."""

    code = "model_failed"


class EngineBroken(ServiceError):
    """The engine can no longer do what it did before."""

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
    """The answer would have come too late."""

    status, type, code = HTTPStatus.GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded"
