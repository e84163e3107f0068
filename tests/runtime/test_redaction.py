"""No secret is written down, in whatever form a configuration, a command line or an error holds it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.fixtures.configs.configurations import composed, options
from vitscope.config import loading
from vitscope.runs import run_dir, run_end, wandb_mirror
from vitscope.runtime import redaction
from vitscope.runtime.errors import ConfigError, first_line

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize("key", [
    "OPENAI_KEY", "MYSQL_PWD", "api-key", "private-key", "api_key", "apiKey", "APIKEY", "openaiKey", "ssh-key", "SSH_KEY", "auth",
    "DB_PASS", "db-password", "PGPASSWORD", "hf_token", "GITHUB_TOKEN", "token", "access-token", "accessToken", "authToken",
    "model.hf_token", "client_secret", "credentials", "aws.secret_access_key", "wandb_api_key", "passphrase", "GH_PAT", "bearer",
    "hf_tokens", "access_tokens", "OPENAI_KEYS", "db_pw", "Authorization", "SLACK_WEBHOOK_URL", "SENTRY_DSN", "SSHPASS", "PGPASS",
    "mysqlpwd", "oauth2", "connection_string", "SharedAccessSignature", "cookies", "wandbkey", "hfToken",
    "session_cookie", "ENCRYPTION_KEY", "license.key", "REDIS_AUTH", "X-Auth-Token", "TOKEN_GITHUB", "secret_key",
])  # fmt: skip
def test_names_of_secrets(key: str) -> None:
    assert redaction.is_secret(key)


@pytest.mark.parametrize("key", [
    "tokens", "tokenizer", "tokens_dim", "class_token", "cls_token", "reg_tokens", "num_token", "token_dim", "token_mixer",
    "author", "PWD", "OLDPWD", "key", "key_dim", "sort_key", "qkv_bias", "keys", "forward_pass", "path", "compass", "passes",
    "patch_size", "monkey", "label_key", "analysis", "pass", "n_pass", "hf_tokenizer",
])  # fmt: skip
def test_names_of_this_field_are_none(key: str) -> None:
    assert not redaction.is_secret(key)


def test_no_configuration_of_ours_is_changed() -> None:
    for file in sorted(loading.folder().rglob("*.yaml")):
        group = file.relative_to(loading.folder()).parent.name
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        tree = {group: {file.stem: tree}} if group in ("analysis", "callbacks") else {group: tree} if group else tree
        assert redaction.redacted(tree) == tree, file.name
    tree = loading.plain(composed("train", f"analysis=[{','.join(options('analysis'))}]"))
    assert redaction.redacted(tree) == tree


@pytest.mark.parametrize("tree", [
    {"api_key": SECRET}, {"api_key": 1234567890}, {"pin_token": 12345678.5}, {"api_key": [SECRET]}, {"auth": {"user": SECRET}},
    {"auth": {"a": {"b": [{"c": SECRET}]}}}, {"private-key": f"-----BEGIN-----\n{SECRET}\n-----END-----"},
    {"a": [{"b": {"hf_token": SECRET}}]}, {"api_key": SECRET, "copy": SECRET}, {"api_key": SECRET, "x": f"https://h/?k={SECRET}"},
    {"auth": {"k": SECRET}, "x": [f"--k {SECRET}"]}, {"x": f"{{api_key: {SECRET}}}"}, {"x": f"{{'api_key': '{SECRET}'}}"},
    {"x": f"api_key={SECRET}"}, {"x": json.dumps({"a": {"password": SECRET}})}, {"x": f"https://user:{SECRET}@host"},
    {"x": f"https://{SECRET}@host"}, {SECRET: 1, "api_key": SECRET}, {"api_key": (SECRET, 1)}, {"api_key": {SECRET: 1}},
    {"mysql": {"pwd": SECRET}}, {"db": {"pass": SECRET}}, {"openai": {"key": SECRET}}, {"x": SECRET.encode(), "api_key": SECRET},
    {"api_key": SECRET.encode(), "x": SECRET}, {"env": [{"name": "OPENAI_KEY", "value": SECRET}]}, {"x": ["--password", SECRET]},
    {"x": {"key": "api_key", "value": SECRET}}, {"headers": {"Authorization": f"Bearer {SECRET}"}}, {"x": [["api_key", SECRET]]},
    {"x": [f"Authorization: Bearer {SECRET}"]}, {"x": f"run --password {SECRET}"}, {"x": f"curl -u user:{SECRET} h"},
    {"x": f"user:{SECRET}@host"}, {"x": f"https://h/?sig={SECRET}&a=1"}, {"x": f"https://h/?X-Amz-Signature={SECRET}"},
    {"x": json.dumps(json.dumps({"api_key": SECRET}))}, {"x": f"api_key: |\n  {SECRET}\n  {SECRET}\nb: 1\n"},
    {"x": f"api_key:\n  - a\n  - {SECRET}\nb: 1"}, {"x": f"api_key => {SECRET}"}, {"x": f"https://user:a/{SECRET}@host"},
    {"api_key": SECRET, "x": base64.b64encode(SECRET.encode()).decode()}, {"api_key": SECRET, "x": SECRET.encode().hex()},
    {"x": f"<password>{SECRET}</password>"}, {"x": f"<a><db:password kind='x'>{SECRET}\n</db:password></a>"},
    {"x": [f"model.api_key={SECRET}", f"+a={{b: {{password: [{SECRET}]}}, c: 1}}"]},
], ids=str)  # fmt: skip
def test_trees(tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    text = repr(redaction.redacted(tree))
    encoded = (base64.b64encode(SECRET.encode()).decode().rstrip("="), SECRET.encode().hex())
    assert not any(part in text for part in (SECRET, "hunter2", "1234567", *encoded))
    assert redaction.REDACTED in text


@pytest.mark.parametrize("value", [
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789", "AKIAIOSFODNN7EXAMPLE",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "glpat-abcdefghijklmnopqrst", "xoxb-1234567890-abcdefgh",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEabcdefgh\nzzzz\n-----END RSA PRIVATE KEY-----",
])  # fmt: skip
def test_known_forms_under_any_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    assert redaction.redacted({"x": value, "y": [f"a {value} b"]}) == {"x": "redacted", "y": ["a redacted b"]}
    assert redaction.masked(f"failed with {value}") == "failed with redacted"


def test_names_of_a_project_are_sent_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict = {}
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb_mirror.wandb, "init", lambda **arguments: sent.update(arguments))
    every = dict.fromkeys(("project", "group", "name", "entity"), "x-${oc.env:HF_TOKEN}")
    cfg = OmegaConf.create(
        {"paths": {"runs": str(tmp_path)}, "seed": 1, "logger": {**every, "tags": ["${oc.env:HF_TOKEN}"]}}
    )
    wandb_mirror.start(cfg, run_dir.create(cfg, "train"), "train")
    assert sent["project"] == "x-redacted"
    assert "hunter2" not in repr(sent)


def test_what_tells_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        "api_key": None,
        "password": "",
        "token": False,
        "credentials": {},
        "secret": [],
        "n": 5,
        "x": (1, 2.5),
        "y": "text",
    }
    assert redaction.redacted(tree) == tree


@pytest.mark.parametrize("argument", [
    f"api_key={SECRET}", f"+model.api_key={SECRET} more", f"++a.private-key='{SECRET}'", f"model.auth={{user: {SECRET}}}",
    f"+model.options={{api_key: {SECRET}, x: 1}}", f"+model.options={{'api-key': '{SECRET}'}}", f"+a=[{{token: {SECRET}}}]",
    f'+a={{b: {{password: "{SECRET}, and"}}}}', f"+a={{x: 1, OPENAI_KEY: [{SECRET}, {SECRET}]}}", f"a.url=https://u:{SECRET}@h/p",
    f"+openai={{key: {SECRET}}}", f"+db={{pwd: {SECRET}}}", f"+e=[{{name: HF_TOKEN, value: {SECRET}}}]",
    f"+x=[password,{SECRET}]", f"+h='Authorization: Bearer {SECRET}'", f"+h={{Authorization: 'Bearer {SECRET}'}}",
    f"+a={{MYSQL_PWD:{SECRET}}}", f"https://h/?api_key={SECRET}&x=1", f"a@b.api_key={SECRET}",
])  # fmt: skip
def test_arguments(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    assert "hunter2" not in redaction.cleaned(argument)
    assert redaction.REDACTED in redaction.cleaned(argument)


@pytest.mark.parametrize("argument", ["model.name=resnet18", "analysis=[cka]", "+x={a: 1, b: [2, 3]}", "optimizer.lr=1e-3",
                                      "+x={key: 64, layers: [a, b]}", "model.name=vit_base_patch16_224.augreg", "+x=[cls, avg]",
                                      "data.root=/a/b:c", "model.class_token=true",
                                      "callbacks.checkpoint.monitor=val/nll"])  # fmt: skip
def test_other_arguments_stay(argument: str) -> None:
    assert redaction.cleaned(argument) == argument


LINES = f"-----BEGIN KEY-----\n{SECRET}\t'quoted' \"twice\"\n\u00e9nd-of-the-key"


@pytest.mark.parametrize("text", [
    SECRET, repr(LINES), json.dumps(LINES), json.dumps(LINES, ensure_ascii=False), LINES, " ".join(LINES.split()),
    LINES.replace("\n", "\n    "), repr(ValueError(LINES)), repr(repr(LINES)), f"line {SECRET} of it", f"{SECRET}-and-more",
    f"{SECRET}%2Band%20more",
], ids=str)  # fmt: skip
def test_values_of_the_environment_in_every_form(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several lines, escaped, one secret that begins with another (the longer one leaves no rest)."""
    monkeypatch.setattr(redaction, "_remembered", set())
    monkeypatch.setenv("A_PRIVATE_KEY", LINES)
    monkeypatch.setenv("B_KEY", SECRET)
    monkeypatch.setenv("C_TOKEN", f"{SECRET}-and-more")
    monkeypatch.setenv("D_TOKEN", f"{SECRET}+and more")
    found = redaction.masked(text)
    assert "hunter2" not in found
    assert "and-more" not in found
    assert "and%20more" not in found
    assert "nd-of-the-key" not in found


def test_a_number_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_TOKEN", "1234567890")
    cfg = OmegaConf.create({"x": "${oc.decode:${oc.env:BANK_TOKEN}}", "y": 5})
    assert loading.plain(run_dir.redacted(cfg)) == {"x": "redacted", "y": 5}


def test_no_file_of_a_run_and_nothing_for_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``config.yaml``, ``provenance.json`` (arguments and notes), ``log.txt``, errors that are cut, W&B's configuration."""
    monkeypatch.setattr(redaction, "_remembered", set())
    monkeypatch.setattr(
        "sys.argv", ["train.py", f"+model.options={{api-key: {SECRET}}}", f"+model.auth=[{SECRET}]", "seed=1"]
    )
    cfg = OmegaConf.create({
        "paths": {"runs": str(tmp_path / "runs")}, "seed": 1, "model": {"options": {"api-key": SECRET}, "auth": [SECRET], "n": 3},
        "copy": "${model.options.api-key}",
    })  # fmt: skip
    run = run_dir.create(cfg, "train")
    run.note(reason=f"refused by {SECRET}")
    run_end.log_tracebacks_to(run)
    run_end.log_traceback(f"Traceback: {SECRET!r}")
    text = "".join(file.read_text() for file in run.path.iterdir())
    assert "hunter2" not in text
    assert "hunter2" not in repr(wandb_mirror.flattened(cfg))
    assert "hunter2" not in str(ConfigError("x", None, f"not {SECRET}", "mend"))
    assert "hunter2" not in first_line(ValueError("x" * 292 + SECRET))  # cut inside of the secret
    assert run.config().model.n == 3
