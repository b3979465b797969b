const input = { target: "openapi.json" };

module.exports = {
  fetch: { input, output: { target: "orval/api.ts", client: "fetch" } },
  zod: { input, output: { target: "orval/zod.ts", client: "zod" } },
};
