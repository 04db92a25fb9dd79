"""Fill the IAM documents in for your account: `python cluster/render.py iam --out FOLDER ...`.

In: AWS credentials as boto3 finds them, a zone, where data and runs live.
Out: a folder of IAM documents. Nothing is written when something is amiss: one line, exit code 2.
"""

import argparse
import re
import sys
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from raytrain_brats.errors import UserError

HERE = Path(__file__).parent


def fill(text: str, values: dict[str, str]) -> str:
    """`text` with every FILL_NAME replaced by values["NAME"]."""
    return re.sub(r"FILL_([A-Z_]*[A-Z])", lambda found: values[found[1]], text)


def bucket(uri: str, option: str) -> str:
    if not (found := re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)(/.*)?", uri)):
        raise UserError(f"{option} {uri!r} is not s3://BUCKET/FOLDER")
    return found[1]


def iam_documents(args: argparse.Namespace) -> dict[str, str]:
    """{file: document} of cluster/iam with account, region and buckets filled in; one bucket.json for each bucket."""
    region = args.zone[:-1]
    values = {
        "REGION": region,
        "ACCOUNT": boto3.Session(region_name=region).client("sts").get_caller_identity()["Account"],
        "DATA_BUCKET": bucket(args.data, "--data"),
        "RUNS_BUCKET": bucket(args.runs, "--runs"),
    }
    templates = {path.name: path.read_text() for path in sorted((HERE / "iam").glob("*.json"))}
    policy = templates.pop("bucket.json")
    buckets = {f"bucket-{name}.json": fill(policy, {"BUCKET": name}) for key, name in values.items() if "BUCKET" in key}
    return {name: fill(text, values) for name, text in templates.items()} | buckets


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cluster/render.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["iam"])
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--zone", required=True, help="availability zone, such as us-west-2b")
    parser.add_argument("--data", required=True, help="s3://BUCKET/FOLDER of the cases; nodes may only read it")
    parser.add_argument("--runs", required=True, help="s3://BUCKET/FOLDER of prepared cases and runs")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d[a-z]", args.zone):
        parser.error(f"--zone {args.zone!r} is not an availability zone, such as us-west-2b")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        documents = iam_documents(args)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in documents.items():
            (args.out / name).write_text(text)
        print(f"{len(documents)} documents in {args.out}; docs/ec2.md, Once per account, says what to do with them")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (BotoCoreError, ClientError) as error:
        print(f"failed: AWS: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
