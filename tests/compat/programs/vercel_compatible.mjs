// The Vercel AI SDK with its provider for OpenAI-compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { baseURL, failure, long, model, nobody, place, question, report, short } from "./common.mjs";

const provider = createOpenAICompatible({ name: "dijiang", baseURL, includeUsage: true, supportsStructuredOutputs: true });
const plain = { model: provider(model), prompt: question, maxOutputTokens: short, temperature: 0, maxRetries: 0 };
const whole = await generateText(plain);
let streamed = "";
const stream = streamText(plain);
for await (const text of stream.textStream) streamed += text;
const tools = { look_up: tool({ description: "Looks up.", inputSchema: place }) };
const called = await generateText({ ...plain, maxOutputTokens: long, tools, toolChoice: "required" });
const calling = streamText({ ...plain, maxOutputTokens: long, tools, toolChoice: "required" });
await calling.consumeStream();
const { object } = await generateObject({ ...plain, maxOutputTokens: long, schema: place });
report({
  text: whole.text,
  streamed,
  calls: [...called.toolCalls, ...(await calling.toolCalls)].map((call) => call.input),
  structured: [object],
  usage: [whole.usage.outputTokens, (await stream.usage).outputTokens],
  error: await failure(() => generateText({ ...plain, model: provider(nobody) })),
});
