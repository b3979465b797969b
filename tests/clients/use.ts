/* Uses the generated clients against the server whose URL is the first argument. Prints "ok" if
   every client submits the README's job and reads it, and if zod accepts what the server accepts. */

import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import { createClient as createHeyClient, createConfig } from "./hey/client";
import { getJob, submitJob } from "./hey";
import * as orval from "./orval/api";
import * as zod from "./orval/zod";
import type { paths } from "./schema";

const baseUrl = process.argv[2]!;
const job: orval.SendEmailJob = {
  type: "send-email",
  payload: { to: "user@example.com", subject: "Hello", body: "Hi" },
};
const invalid = { ...job, payload: { ...job.payload, subject: "two\nlines" } };

async function useOpenapiFetch() {
  const client = createClient<paths>({ baseUrl });
  const submitted = await client.POST("/jobs", { body: job });
  const id = submitted.data!.jobId;
  const ended = await client.GET("/jobs/{id}", { params: { path: { id }, query: { wait: 20 } } });
  assert.equal(ended.data!.status, "completed");
  const refused = await client.POST("/jobs", { body: invalid });
  assert.equal(refused.error!.field, "payload");
}

async function useHeyApi() {
  const client = createHeyClient(createConfig({ baseUrl }));
  const submitted = await submitJob({ client, body: job });
  const ended = await getJob({ client, path: { id: submitted.data!.jobId }, query: { wait: 20 } });
  assert.equal(ended.data!.type, "send-email");
  const missing = await getJob({ client, path: { id: "01900000-0000-7000-8000-000000000000" } });
  assert.equal(missing.error!.type, "urn:tinyqueue:not-found");
}

async function useOrval() {
  const relative = globalThis.fetch;
  globalThis.fetch = (path, options) => relative(baseUrl + path, options);
  zod.submitJobBody.parse(job);
  assert.equal(zod.submitJobBody.safeParse(invalid).success, false);
  const submitted = await orval.submitJob(job);
  assert.equal(submitted.status, 201);
  const batch = await orval.submitJobs([job, job]);
  assert.equal(batch.status, 201);
  const listed = await orval.listJobs({ limit: 1, status: "" });
  zod.listJobsResponse.parse(listed.data);
  zod.getStatsResponse.parse((await orval.getStats({ minutes: 1 })).data);
  zod.listWorkersResponse.parse((await orval.listWorkers()).data);
  zod.getCallerResponse.parse((await orval.getCaller()).data);
}

async function main() {
  await useOpenapiFetch();
  await useHeyApi();
  await useOrval();
  console.log("ok");
}

main();
