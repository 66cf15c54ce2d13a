"""What a request is refused with, in the form that OpenAI's clients read."""

_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A refusal.

    status: of HTTP. param: the field of the request that is wrong. code: for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, object]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}
