// What @huggingface/hub makes of the hub: node npm_client.mjs MODULE HUB TOKEN; one line of JSON.
import { createHash } from "node:crypto";
import { pathToFileURL } from "node:url";

const [module, hubUrl, accessToken] = process.argv.slice(2);
const hub = await import(pathToFileURL(module));
const repo = { type: "model", name: "alice/node" };
const given = { repo, hubUrl, accessToken };
const sha256 = async (blob) =>
  createHash("sha256").update(Buffer.from(await blob.arrayBuffer())).digest("hex");

const who = await hub.whoAmI({ hubUrl, accessToken });
const made = await hub.createRepo({ ...given, repo: { type: "model", name: "alice/second" } });
const again = await hub.createRepo({ ...given, private: true }).catch((error) => error.statusCode);
const weights = new Blob([new Uint8Array(1_000_000).fill(7)]);
const files = [
  { path: "README.md", content: new Blob(["---\nlicense: mit\n---\nby node\n"]) },
  { path: "deep/a.txt", content: new Blob(["a"]) },
  { path: "w.safetensors", content: weights },
];
const commit = await hub.uploadFiles({ ...given, files, title: "from node", useXet: false });
await hub.deleteFile({ ...given, path: "deep/a.txt" });

const listed = [];
for await (const entry of hub.listFiles({ ...given, recursive: true })) listed.push(entry);
const commits = [];
for await (const entry of hub.listCommits(given)) commits.push(entry.title);
const downloaded = {};
for (const path of ["README.md", "w.safetensors", "from_python.safetensors"]) {
  const blob = await hub.downloadFile({ ...given, path });
  downloaded[path] = blob && (await sha256(blob));
}
const large = await hub.fileDownloadInfo({ ...given, path: "w.safetensors" });
const info = await hub.modelInfo({ ...given, name: repo.name });
const stale = await hub
  .uploadFiles({ ...given, files: files.slice(1, 2), parentCommit: commit.commit.oid, useXet: false })
  .catch((error) => error.statusCode);
const stranger = await hub
  .modelInfo({ hubUrl, name: repo.name, accessToken: "hf_bob_writes" })
  .catch((error) => error.statusCode);

console.log(
  JSON.stringify({
    who: who.name, role: who.auth.accessToken.role, made: made.repoUrl, again, oid: commit.commit.oid,
    listed, commits, downloaded, large: [large.size, large.etag], weights: await sha256(weights),
    info: [info.name, info.private], stale, stranger,
  }),
);
